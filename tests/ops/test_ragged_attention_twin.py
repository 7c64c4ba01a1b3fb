"""The work of ragged attention on pairs of bfloat16 numbers beside scalar models of its instructions."""

import shutil

import pytest

from twins import run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_layouts_products_and_exponentials_on_pairs_are_those_of_their_instructions(tmp_path):
    differing, (levels, cases) = run("ragged_attention_pairs", tmp_path)
    assert not differing
    # Waits for AVX512-BF16: three layouts of forty sizes; products of 4 × 3 × 6 sizes, of rows and of columns, begun
    # and added to; exponentials twice.
    assert cases == (3 * 40 + 4 * 3 * 6 * 2 * 2 + 2 if levels == 5 else 0)
