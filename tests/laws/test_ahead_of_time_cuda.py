"""Law 7: every .cu compiles for sm_90a, without a spill, where nvcc and the compiler it calls are; the inner loops of
the kernels that are to reach the memory's speed keep their budgets of instructions.

``make gpu-dry`` (GAUGEKIT_EVERY_ARCHITECTURE=1) compiles for sm_80 too.
"""

import os
import re
import shutil

import pytest

from sass import CUOBJDUMP, NVCC, ROOT, Kernel, compile_cuda

EVERY = bool(os.environ.get("GAUGEKIT_EVERY_ARCHITECTURE"))
# Instructions that a thread issues in the loop of packed_linear's tile, which takes 64 of its weights: 8 a weight, an
# H200's budget, for up to 8 rows of x, and an H100's 11 for up to 16.
TILE_WEIGHTS, TILE_BUDGET = 64, {1: 8, 2: 11}
# bfloat16's loop of eight groups has 220, of which those that bring words run in a third of the turns: 26 a group.
SLOT_GROUPS, SLOT_LOOP = 8, 220
# Attention from one cache: steps of a warp -> instructions of a thread a tile of 16 rows, of which one lane alone has
# some 200. An H200's memory leaves 8 warps 1,765 at 16 steps and 882 at 8; the 441 at 4 are not kept: narrow rows may
# wait for issue, turned keys more so.
CACHE_LOOP, CACHE_TURNED_LOOP = {4: 570, 8: 700, 16: 880}, 920


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


def single_cache_attention(kernels: list[Kernel]) -> None:
    splits = [kernel for kernel in kernels if "_single_cache_attention_split" in kernel.name]
    assert len(splits) == 2 * (3 + 3 + 1)  # two dtypes; plain and means at three widths, turned keys at one
    for kernel in splits:
        form, steps = map(int, re.search(r"FormE(\d)ELi(\d+)E", kernel.name).groups())
        tile = kernel.loops_with("HMMA", 4 * steps)[0]  # two for the scores and two for the sums of a step
        assert sum("LDSM" in text for text in tile) == 2 * steps  # each row is read twice, by a word of four
        budget = CACHE_TURNED_LOOP if form == 2 else CACHE_LOOP[steps]
        assert len(tile) <= budget, (kernel.name, len(tile))
        assert any("UBLKCP" in text for text in kernel.code.values())  # rows come by bulk copies
        two = steps <= (4 if form == 1 else 8)  # blocks on a multiprocessor
        assert kernel.registers <= (128 if two else 255)


BUDGETS = {"packed_linear": packed_linear, "rans": rans, "single_cache_attention": single_cache_attention}


@pytest.mark.slow
@pytest.mark.skipif(None in (NVCC, CUOBJDUMP, shutil.which("gcc")), reason="needs nvcc, cuobjdump and gcc")
@pytest.mark.parametrize("arch", ["80", "90a"] if EVERY else ["90a"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles(source, arch, tmp_path):
    kernels = compile_cuda(source, tmp_path / "kernel.cubin", arch)
    assert kernels and all(kernel.spill_bytes == 0 for kernel in kernels)
    if arch == "90a":
        BUDGETS[source.stem](kernels)
