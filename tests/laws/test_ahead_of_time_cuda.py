"""Law 7: every .cu compiles for sm_90a, without a spill, where nvcc and the compiler it calls are; the inner loops of
the kernels that are to reach the memory's speed keep their budgets of instructions.

``make gpu-dry`` (GAUGEKIT_EVERY_ARCHITECTURE=1) compiles for sm_80 too.
"""

import os
import shutil

import pytest

from sass import CUOBJDUMP, NVCC, ROOT, Kernel, compile_cuda

EVERY = bool(os.environ.get("GAUGEKIT_EVERY_ARCHITECTURE"))
# Instructions that a thread issues in the loop of packed_linear's tile, which takes 64 of its weights: 8 a weight, an
# H200's budget, for up to 8 rows of x, and an H100's 11 for up to 16.
TILE_WEIGHTS, TILE_BUDGET = 64, {1: 8, 2: 11}
# bfloat16's loop of eight groups has 220, of which those that bring words run in a third of the turns: 26 a group.
SLOT_GROUPS, SLOT_LOOP = 8, 220


def packed_linear(kernels: list[Kernel]) -> None:
    tiles = [kernel for kernel in kernels if "_packed_linear_tile" in kernel.name]
    assert len(tiles) == 8  # two dtypes, two widths of a code, two numbers of rows of x
    for kernel in tiles:
        tiles_of_x = 2 if "ELi2E" in kernel.name else 1
        (loop,) = kernel.loops_with("HMMA", 8 * tiles_of_x)
        assert len(loop) <= TILE_BUDGET[tiles_of_x] * TILE_WEIGHTS, (kernel.name, len(loop))
        assert kernel.registers <= 128  # two blocks on a multiprocessor


def rans(kernels: list[Kernel]) -> None:
    (kernel,) = (kernel for kernel in kernels if "_rans_decode_slots" in kernel.name)
    loops = [
        loop
        for loop in kernel.loops_with("VOTE", SLOT_GROUPS)
        if sum("STG.E.U16" in text for text in loop) == SLOT_GROUPS
        and sum("LDG.E.U8" in text for text in loop) == SLOT_GROUPS
    ]
    assert len(loops) == 2  # bfloat16's exponents, and the high byte of 16 bits
    assert max(map(len, loops)) <= SLOT_LOOP, [len(loop) for loop in loops]
    assert kernel.shared_bytes <= 25 * 1024  # nine chunks on a multiprocessor: 4096 x 4096 in 1024 of them


@pytest.mark.slow
@pytest.mark.skipif(None in (NVCC, CUOBJDUMP, shutil.which("gcc")), reason="needs nvcc, cuobjdump and gcc")
@pytest.mark.parametrize("arch", ["80", "90a"] if EVERY else ["90a"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles(source, arch, tmp_path):
    kernels = compile_cuda(source, tmp_path / "kernel.cubin", arch)
    assert kernels and all(kernel.spill_bytes == 0 for kernel in kernels)
    if arch == "90a":
        {"packed_linear": packed_linear, "rans": rans}[source.stem](kernels)
