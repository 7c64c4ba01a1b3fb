"""The skip path of a sliced model, x S + y: polar shortcuts beside dense ones as SliceGPT's users write them.

    python bench/shortcuts.py                 # D 576 and 4096, slices of 20, 25 and 30 %, 1 and 256 tokens, one thread
    python bench/shortcuts.py --quick         # D 576 alone, short runs
    python bench/shortcuts.py --save

Ours is what a sliced block runs: a PolarShortcut, then the block's own sum. ``without_us`` is the faster of two ways
to write the dense product. The triangular form computes the dense product, from a matrix unpacked once. Calls go
through as many junctions in turn as a model has, or as exceed a processor's caches: in a model no junction follows
itself. ``ratio`` is the rival's time over ours.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator

import torch

import host_rows
from gaugekit.nn.shortcuts import PolarShortcut, TriangularShortcut
from gaugekit.nn.triangle import pack_triangle
from gaugekit.slicing import sliced_width
from registry import ONLY, Case, name_of, wanted
from run import commit, machine, save, table

CACHES = 128 << 20  # bytes: more than the last cache of the processors this runs on


def bases(size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, Y) of two random subspaces: S = I − Y Yᵀ [width, width], Y [width, size − width] with a lower triangle."""
    rank = size - width
    turn, _ = torch.linalg.qr(torch.randn(width, rank))
    factor = turn * torch.rand(rank).sqrt()
    turn, _ = torch.linalg.qr(factor[:rank].mT)
    factor = factor @ turn
    return torch.eye(width) - factor @ factor.mT, factor


class Junctions:
    """Shortcuts of one size that take turns; each call is another's."""

    def __init__(self, size: int, width: int, tokens: int, dtype: torch.dtype):
        rank = size - width
        self.x, self.y = (torch.randn(tokens, width).to(dtype) for _ in range(2))
        matrix, factor = bases(size, width)
        count = max(2, math.ceil(CACHES / (factor.numel() * dtype.itemsize)))
        self.matrix = matrix.to(dtype)
        self.polar = [self._polar(width, rank, factor, dtype) for _ in range(count)]
        dense = max(2, math.ceil(CACHES / (matrix.numel() * dtype.itemsize)))
        self.matrices = [self.matrix.clone() for _ in range(dense)]
        self.triangular = [self._triangular(width, dtype) for _ in range(dense)]
        for shortcut in (*self.polar, *self.triangular):
            shortcut.matrix()  # unpacked before anything is timed

    @staticmethod
    def _polar(width: int, rank: int, factor: torch.Tensor, dtype: torch.dtype) -> PolarShortcut:
        shortcut = PolarShortcut(width, rank, dtype=dtype).requires_grad_(False)
        shortcut.packed.copy_(pack_triangle(factor[:rank]))
        shortcut.rest.copy_(factor[rank:])
        return shortcut

    def _triangular(self, width: int, dtype: torch.dtype) -> TriangularShortcut:
        shortcut = TriangularShortcut(width, dtype=dtype).requires_grad_(False)
        shortcut.packed.copy_(pack_triangle(torch.randn(width, width)))
        return shortcut

    def calls(self) -> dict[str, Callable[[], torch.Tensor]]:
        """What is timed, by name; every call is the next junction's."""
        x, y = self.x, self.y
        polar, triangular = itertools.cycle(self.polar), itertools.cycle(self.triangular)
        first, second = itertools.cycle(self.matrices), itertools.cycle(self.matrices)
        return {
            "polar": lambda: next(polar)(y, x) + x,
            "dense, addmm": lambda: torch.addmm(y, x, next(first)),
            "dense, matmul and add": lambda: x @ next(second) + y,
            "triangular": lambda: next(triangular)(y, x) + x,
        }

    def check(self) -> None:
        """AssertionError where polar is not x S + y to twice the rounding of the dense product."""
        exact = self.x.double() @ self._exact() + self.y.double()
        calls = self.calls()
        error, dense = (float((calls[n]().double() - exact).norm()) for n in ("polar", "dense, addmm"))
        assert error <= 2 * dense, f"error {error:.2e}, of the dense product {dense:.2e}"

    def _exact(self) -> torch.Tensor:
        factor = self.polar[0].matrix().double()  # Yᵀ
        return torch.eye(factor.shape[1]) - factor.mT @ factor


def cases(quick: bool) -> Iterator[Case]:
    for size in (576,) if quick else (576, 4096):
        for tokens, dtype, fraction in itertools.product(
            (1, 256), (torch.float32, torch.bfloat16), (0.2, 0.25, 0.3)
        ):
            width, kind = sliced_width(size, fraction), str(dtype).removeprefix("torch.")
            if not wanted(f"D{size} D'{width} T{tokens} {kind} {fraction:.0%}"):
                continue
            torch.manual_seed(0)
            junctions = Junctions(size, width, tokens, dtype)
            calls = junctions.calls()
            rank, item = size - width, dtype.itemsize
            yield Case(
                op="shortcut",
                shape=f"D{size} D'{width} T{tokens}",
                dtype=kind,
                device="cpu",
                ours=calls.pop("polar"),
                rivals=calls,
                without_us=("dense, addmm", "dense, matmul and add"),
                check=junctions.check,
                bytes_moved=(width * rank + 3 * tokens * width) * item,
                flops=4 * tokens * width * rank,
                threads=1,
                seconds=1.0,
                label=f"{fraction:.0%}",
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="D 576 alone, short runs")
    parser.add_argument(
        "--only", action="append", default=[], help="only cases with this in shape, dtype or label"
    )
    parser.add_argument("--save", action="store_true", help="keep the rows under bench/results/")
    options = parser.parse_args()
    ONLY[:] = options.only
    where, rows, known = {"machine": machine("cpu"), "commit": commit()}, [], {}
    with torch.no_grad():
        for case in cases(options.quick):
            print(name_of(case), file=sys.stderr, flush=True)
            seconds = 0.1 if options.quick else case.seconds
            measured = [row | where for row in host_rows.measure(case, seconds, known)]
            rows += measured
            if options.save:  # at once: the next case may take long
                save(measured, "shortcut", "cpu")
    print(table(rows))


if __name__ == "__main__":
    main()
