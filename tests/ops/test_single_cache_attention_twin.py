"""The work of attention from one cache on pairs of bfloat16 numbers beside scalar models of its instructions."""

import shutil

import pytest

from twins import run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_scores_sums_and_turns_on_pairs_are_those_of_their_instructions(tmp_path):
    differing, (levels, cases) = run("single_cache_attention_pairs", tmp_path)
    assert not differing
    # Waits for AVX512-BF16: scores of 7 × 3 × 6 sizes, sums of 8 × 2 × 9, turns of 5 × 2 × 2.
    assert cases == (7 * 3 * 6 + 8 * 2 * 9 + 5 * 2 * 2 if levels == 5 else 0)
