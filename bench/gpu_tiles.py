"""Other tiles and variants of the fused attention beside those that ship: which is the fastest only a GPU can tell.

Every other tile compiles for sm_90 with Triton 3.6 without spills. Its result stands beside that of the shipped one:
``largest_difference`` over the largest value.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

import torch

import gaugekit as gk
import gpu_ledger as ledger
from backends import CudaBackend
from gaugekit.ops.shaped_attention import use_core
from gaugekit.triton_kernels.shaped_attention_tiles import TILES, VARIANTS, use_variant

BATCH, HEADS, LENGTH = 4, 16, 4096
REPEATS = 10
WIDTHS = (64, 128)
# (part, widest of K and V) -> queries and keys of a tile, warps, stages; bfloat16, causal.
OTHERS = {
    ("forward", 64): [(64, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2)],
    ("forward", 128): [(64, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 4)],
    ("keys", 64): [(64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2)],
    ("keys", 128): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 128, 8, 2)],
    ("queries", 64): [(64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 3)],
    ("queries", 128): [(64, 64, 8, 2), (64, 32, 8, 2), (128, 32, 8, 2)],
}


def calls(width: int):
    """The forward and the backward of one causal call with every gain, on random operands."""
    operands = [
        torch.randn(BATCH, HEADS, LENGTH, width, device="cuda").bfloat16().requires_grad_() for _ in range(3)
    ]
    gains = {name: torch.ones(HEADS, device="cuda") for name in ("alpha", "beta", "gamma")}
    grad = torch.randn(BATCH, HEADS, LENGTH, width, device="cuda").bfloat16()

    def forward():
        with use_core("fused"):
            return gk.shaped_attention(*operands, **gains, causal=True)

    out = forward()

    def backward():
        return torch.autograd.grad(out, operands, grad, retain_graph=True)

    return forward, backward


def difference(found, shipped) -> float:
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, shipped, strict=True))


def results(call) -> list[torch.Tensor]:
    out = call()
    return [x.detach().float() for x in (out if isinstance(out, tuple) else (out,))]


def milliseconds(call) -> float:
    """The median of ``REPEATS`` calls, after three that warm up."""
    backend = CudaBackend()
    backend.seconds(call, 3)
    return 1e3 * statistics.median(backend.seconds(call, 1) for _ in range(REPEATS))


def candidates(width: int):
    """(what it is, its call), each in effect until the next is asked for; what ships comes first in its group."""
    forward, backward = calls(width)
    for way, call in (("forward", forward), ("backward", backward)):
        for name in VARIANTS:
            with use_variant(name):
                yield (
                    {"variant": name, "way": way, "width": width, "shipped": name == next(iter(VARIANTS))},
                    call,
                )
    for part, call in (("forward", forward), ("keys", backward), ("queries", backward)):
        key = (part, 2, width)
        shipped = TILES[key]
        try:
            for tile in [shipped, *OTHERS[part, width]]:
                TILES[key] = tile
                yield {"tiles": part, "width": width, "tile": list(tile), "shipped": tile == shipped}, call
        finally:
            TILES[key] = shipped


def measured(call, expected: list[torch.Tensor]) -> dict:
    try:
        return {"largest_difference": difference(results(call), expected), "ms": milliseconds(call)}
    except Exception as error:  # too little memory, a compiler's refusal: the next one may do
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def main(measures: Path) -> None:
    """One line a candidate; one that fails is a line too."""
    commit = os.environ.get("GAUGEKIT_COMMIT", "unknown")
    for width in WIDTHS:
        for line, call in candidates(width):
            if line["shipped"]:
                expected = results(call)
            ledger.append(measures, line | measured(call, expected) | {"commit": commit})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
