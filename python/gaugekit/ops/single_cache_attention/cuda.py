"""``single_cache_attention`` on CUDA: Triton's kernels, the binary's where ``use_core`` asks, or the composition.

triton is imported on the first call, never before.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops.single_cache_attention import choice
from gaugekit.ops.single_cache_attention.operator import ARGUMENTS, composition, fake

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLE_BYTES = 16  # angles begin at a multiple of so many


def forward(q: Tensor, cache: Tensor, slices: bool, *rest: Any) -> Tensor:
    given = (q, cache, slices, *rest)
    if choice.asked_core() == choice.CUDA and choice.here(q.device) and choice.refusal(*given) is None:
        return torch.ops.gaugekit.single_cache_attention_rows(*dense(*given))
    out = fake(q, cache, slices)
    table = rest[-2]
    if (
        not TRITON
        or q.dtype not in DTYPES
        or out.numel() == 0
        or cache.numel() == 0
        or (table is not None and not table.numel())
    ):
        return composition(q, cache, slices, *rest)
    from gaugekit.triton_kernels.single_cache_attention import single_cache_attention

    single_cache_attention(q, cache, slices, *rest, out)
    return out


def dense(q: Tensor, cache: Tensor, slices: bool, *rest: Any) -> tuple:
    """The operator's arguments as its kernel in the binary reads them: q and cache where they lie, gains and angles of
    float32, all but q and cache dense."""

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = (x.float() if x.is_floating_point() else x).contiguous()
        return x if x.data_ptr() % TABLE_BYTES == 0 else x.clone()

    return (q, cache, slices, *map(own, rest))


TRITON = importlib.util.find_spec("triton") is not None
_library.define(f"single_cache_attention_rows({ARGUMENTS}) -> Tensor", composition, fake)
_library.library.impl("single_cache_attention", forward, "CUDA")
