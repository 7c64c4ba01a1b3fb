"""softmax(scale·q kᵀ) v on torch's FlexAttention, under every mask of shaped attention; chosen by ``use_core("flex")``.

The block mask is made from the interval of keys that each query sees: no array of T·S elements.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from gaugekit.ops.mask import Mask, keys_of_queries
from gaugekit.ops.shaped_attention.core import nothing

BLOCK = 128


def flex_core(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """softmax(scale·q kᵀ) v under the mask; rows that see no key hold any finite numbers.

    Gradients on CUDA only: torch raises NotImplementedError for them on CPUs.
    """
    if q.numel() == 0 or v.numel() == 0:
        return nothing(q, k, v)
    seen = keys_of_queries(q.shape[2], k.shape[2], mask, q.device)
    last = torch.where(seen.last > seen.first, seen.last, seen.first + 1)
    batch = q.shape[0] if last.shape[0] > 1 else 1
    first, last = (x.expand(batch, -1).int() for x in (seen.first, last))
    options = {"block_mask": _blocks(first, last, k.shape[2]), "scale": scale}
    return _flex(q.device.type)(q, k, v, **options, enable_gqa=q.shape[1] != k.shape[1])


def _blocks(first: Tensor, last: Tensor, keys: int):
    """The block mask where query t sees the keys first[t] ≤ j < last[t], both int32 [B, T]."""
    from torch.nn.attention.flex_attention import BlockMask

    queries = first.shape[1]
    start = torch.arange(0, keys, BLOCK, device=first.device, dtype=torch.int32)
    spare = -queries % BLOCK  # rows that fill the last block up: they see what its last row sees
    low, high = (pad(x[None].float(), (0, spare), mode="replicate")[0].int() for x in (first, last))
    low, high = (x.unflatten(1, (-1, BLOCK)) for x in (low, high))
    low, high = low[..., None], high[..., None]
    touched = ((low < start + BLOCK) & (high > start)).any(2)
    whole = ((low <= start) & (high >= start + BLOCK)).all(2)

    def visible(b, h, i, j):
        b = b if first.shape[0] > 1 else b * 0
        return (j >= first[b, i]) & (j < last[b, i])

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        chosen = chosen[:, None].int()
        return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()

    return BlockMask.from_kv_blocks(*listed(touched & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible,
                                    seq_lengths=(queries, keys))  # fmt: skip


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(device: str):
    """FlexAttention compiled by us on a GPU; inside a compiled function, and on CPUs, as it is."""
    if device == "cuda" and not torch.compiler.is_compiling():
        return _compiled()
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention
