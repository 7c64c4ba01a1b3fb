"""Kernels of attention from one cache, compiled from their very headers: by scalar models, or thread by thread."""

import shutil

import pytest

from twins import run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_scores_sums_and_turns_on_pairs_are_those_of_their_instructions(tmp_path):
    differing, (levels, cases) = run("single_cache_attention_pairs", tmp_path)
    assert not differing
    # Waits for AVX512-BF16: scores of 7 × 3 × 6 sizes, sums of 8 × 2 × 9, turns of 5 × 2 × 2.
    assert cases == (7 * 3 * 6 + 8 * 2 * 9 + 5 * 2 * 2 if levels == 5 else 0)


def test_blocks_of_the_gpu_kernel_give_the_equation(tmp_path):
    """Matrix instructions, exchanges and copies are emulated; copies come at once, or when they are waited for."""
    differing, (cases, checked, conflicts) = run("single_cache_block", tmp_path)
    assert not differing
    assert (cases, checked) == (38, 119488)
    assert conflicts == 0  # eight rows of a matrix lie in different banks of shared memory
