"""``packed_linear`` on CUDA: the binary's product for few rows, Triton's kernels, or the composition where neither is.

triton is imported on the first call, never before.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops.packed_linear import layout
from gaugekit.ops.packed_linear.operator import composition
from gaugekit.ops.packed_linear.weight import WEIGHT

BINARY_ROWS = 16  # the most rows of x that the binary's product takes
# Its two ways: every lane multiplies by itself, or 16 rows of W go to tensor cores.
VARIANTS = {"lanes": 0, "tile": 1}
TILE_COLUMNS = 32768  # the most columns of W that a tile takes
TRITON = importlib.util.find_spec("triton") is not None


def variant(dtype: torch.dtype, columns: int) -> int:
    """The tile where it can: no GPU has chosen yet, and by its machine code it takes a seventh of the instructions of
    the lanes a weight, and one kernel instead of two. Tensor cores do not multiply float32 exactly."""
    suits = dtype in (torch.bfloat16, torch.float16) and columns <= TILE_COLUMNS
    return VARIANTS["tile" if suits else "lanes"]


@_library.outside_autocast
def linear(
    x: Tensor,
    raw: Tensor,
    planes: Tensor,
    escapes: Tensor,
    offsets: Tensor,
    window: Tensor,
    bias: Tensor | None,
    fused: bool,
) -> Tensor:
    weight = (raw, planes, escapes, offsets, window)
    suits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() and raw.shape[0]
    if not fused or not suits:
        return composition(x, *weight, bias, fused)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    e5m2 = layout.layout(raw, planes)[0] == torch.float8_e5m2  # which the binary does not know
    if not e5m2 and len(flat) <= BINARY_ROWS and _library.implementation("packed_linear_rows", "CUDA"):
        bias = None if bias is None else bias.contiguous()
        way = variant(flat.dtype, flat.shape[1])
        out = torch.ops.gaugekit.packed_linear_rows(flat, *weight, bias, way)
    elif TRITON:
        from gaugekit.triton_kernels.packed_linear import packed_linear

        out = x.new_empty(len(flat), raw.shape[0])
        packed_linear(out, flat, *weight, bias)
    else:
        return composition(x, *weight, bias, fused)
    return out.view(*x.shape[:-1], raw.shape[0])


def rows(
    x: Tensor,
    raw: Tensor,
    planes: Tensor,
    escapes: Tensor,
    offsets: Tensor,
    window: Tensor,
    bias: Tensor | None,
    variant: int = 0,
) -> Tensor:
    return composition(x, raw, planes, escapes, offsets, window, bias, True)


_library.define(
    f"packed_linear_rows(Tensor x, {WEIGHT}, Tensor? bias, int variant=0) -> Tensor",
    rows,
    lambda x, raw, *_: x.new_empty((x.shape[0], raw.shape[0])),
)
_library.library.impl("packed_linear", linear, "CUDA")
