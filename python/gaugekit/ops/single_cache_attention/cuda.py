"""``single_cache_attention`` on CUDA by the Triton kernels. triton is imported on the first call, never before."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops.single_cache_attention.operator import composition, fake

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(q: Tensor, cache: Tensor, slices: bool, *rest: Any) -> Tensor:
    out = fake(q, cache, slices)
    table = rest[-2]
    if (
        q.dtype not in DTYPES
        or out.numel() == 0
        or cache.numel() == 0
        or (table is not None and not table.numel())
    ):
        return composition(q, cache, slices, *rest)
    from gaugekit.triton_kernels.single_cache_attention import single_cache_attention

    single_cache_attention(q, cache, slices, *rest, out)
    return out


if importlib.util.find_spec("triton") is not None:
    _library.library.impl("single_cache_attention", forward, "CUDA")
