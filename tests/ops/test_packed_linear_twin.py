"""The product's proofs that no Python can give: compiled from the very headers of the kernels, and run."""

import shutil

import pytest

from twins import run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_same_bits_as_on_plain_weights_on_every_instruction_set(tmp_path):
    """Packed weights give the bits that the same product, in the same order of summation, gives on plain weights."""
    differing, (levels, cases) = run("packed_linear_twin", tmp_path)
    assert not differing
    pairs = (
        2 * 7 * 10 if levels == 5 else 0
    )  # waits for AVX512-BF16: seven batches, twice, ten matrices of bfloat16
    assert cases == levels * 5 * 20 + pairs  # five batches, twenty matrices


def test_products_on_pairs_and_tiles_are_those_of_their_instructions(tmp_path):
    """Scalar models of vdpbf16ps and tdpbf16ps in the documented order; the tile registers of AMX are emulated."""
    differing, (levels, cases) = run("packed_linear_models", tmp_path)
    assert not differing
    # Waits for AVX512-BF16, by which both decode: two code widths, six batches, four matrices, two kinds of words.
    assert cases == (2 * 6 * 4 * 2 if levels == 5 else 0)


def test_lanes_of_the_gpu_product_decode_every_word(tmp_path):
    differing, (halves, cases) = run("packed_linear_lanes", tmp_path)
    assert not differing
    assert (halves, cases) == (65536, 16)


def test_lanes_of_the_product_on_tensor_cores_decode_every_word(tmp_path):
    differing, (passes, cases) = run("packed_linear_tile", tmp_path)
    assert not differing
    assert passes >= 1 and cases == 16  # a row of more escapes than are listed at a time is among them
