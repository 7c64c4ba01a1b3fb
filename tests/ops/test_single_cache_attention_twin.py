"""The GPU's attention from one cache, compiled from the very header of its kernel and run thread by thread."""

import shutil

import pytest

from twins import run


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_blocks_on_the_processor_give_the_equation(tmp_path):
    """Matrix instructions, exchanges and copies are emulated; copies come at once, or when they are waited for."""
    differing, (cases, checked, conflicts) = run("single_cache_block", tmp_path)
    assert not differing
    assert (cases, checked) == (38, 119488)
    assert conflicts == 0  # eight rows of a matrix lie in different banks of shared memory
