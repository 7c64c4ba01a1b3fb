"""The product's proofs that no Python can give: compiled from the very headers of the kernels, and run."""

import shutil
from pathlib import Path

import pytest

import arm
from twins import ROOT, read, run

FLAGS = ["-O1", "-ffp-contract=off"]
NATIVE = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
MATRICES, PAIRED, PAIRED_ON_ARM = 30, 20, 10  # of the twin; pairs take bfloat16, and on x86 float8_e5m2
DIGEST = 53836842  # of the sums in the order that every processor has


def source(name: str) -> Path:
    return ROOT / "tests" / "ops" / f"{name}.cpp"


def check_twin(lines: list[str], levels: int, pairs: int) -> None:
    """Five batches and all rows at each level; seven batches of pairs with ``pairs`` comparisons over all matrices."""
    differing, (found, cases, checked, digest) = read(lines)
    assert not differing
    assert found == levels
    assert cases == levels * (5 + 1) * MATRICES + 7 * pairs
    assert checked > (8000 if pairs else 2500)  # infinities and NaNs are left out
    assert digest == DIGEST


@NATIVE
def test_same_bits_as_on_plain_weights_on_every_instruction_set(tmp_path):
    """Packed weights give the bits that the same product, in the same order of summation, gives on plain weights."""
    differing, numbers = run("packed_linear_twin", tmp_path)
    levels = numbers[0]
    summary = "levels {}, cases {}, checked {}, digest {}".format(*numbers)
    # Pairs wait for AVX512-BF16: held against plain, alone and exact ones, and outputs against plain and exact ones.
    check_twin([*differing, summary], levels, 5 * PAIRED if levels == 5 else 0)


@NATIVE
def test_products_on_pairs_outputs_and_tiles_are_those_of_their_instructions(tmp_path):
    """Scalar models of vdpbf16ps and tdpbf16ps in the documented order; the tile registers of AMX are emulated."""
    differing, (levels, cases) = run("packed_linear_models", tmp_path)
    assert not differing
    # Waits for AVX512-BF16, by which both decode: two code widths, six batches, four matrices, two kinds of words.
    assert cases == (2 * 6 * 4 * 2 if levels == 5 else 0)


@arm.EMULATED
@pytest.mark.slow
def test_same_bits_on_arm(tmp_path):
    """And NEON gives the bits that x86 gives; bfdot has an order of its own."""
    binary = arm.compiled(source("packed_linear_twin"), tmp_path / "twin", *FLAGS)
    for processor, levels in arm.PROCESSORS.items():
        check_twin(arm.run(binary, processor), levels, 3 * PAIRED_ON_ARM if levels == 3 else 0)
    check_twin(arm.run(binary, "max", capability="default"), 1, 0)


@NATIVE
def test_lanes_of_the_gpu_product_decode_every_word(tmp_path):
    differing, (halves, cases) = run("packed_linear_lanes", tmp_path)
    assert not differing
    assert (halves, cases) == (65536, 16)


@NATIVE
def test_lanes_of_the_product_on_tensor_cores_decode_every_word(tmp_path):
    differing, (passes, cases) = run("packed_linear_tile", tmp_path)
    assert not differing
    assert passes >= 1 and cases == 16  # a row of more escapes than are listed at a time is among them
