"""Two layouts of queries and keys: ``ragged_attention`` stores [B, T, ΣR], torch's kernels want [B, H, T, K]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def buckets(ranks: list[int], width: int) -> list[tuple[int, list[int]]]:
    """(width, key heads) of each call: ``width`` for all that fit the values', else the next multiple of 16."""
    padded = [width if rank <= width else -(-rank // 16) * 16 for rank in ranks]
    return [
        (size, [g for g, padded_rank in enumerate(padded) if padded_rank == size])
        for size in sorted(set(padded))
    ]


def spread(x: Tensor, ranks: list[int], repeats: int, groups: list[int], width: int) -> Tensor:
    """[B, T, ΣR] -> [B, heads of ``groups``, T, width], zeros behind each head's rank."""
    if len(set(ranks)) == 1 and len(groups) == len(ranks):
        return pad(x.unflatten(2, (-1, ranks[0])), (0, width - ranks[0])).transpose(1, 2)
    heads = x.split([rank for rank in ranks for _ in range(repeats)], dim=2)
    chosen = [heads[group * repeats + member] for group in groups for member in range(repeats)]
    return torch.stack([pad(head, (0, width - head.shape[2])) for head in chosen], 1)


def gather(x: Tensor, ranks: list[int], repeats: int) -> Tensor:
    """The inverse of ``spread`` for all heads: [B, heads, T, width] -> [B, T, ΣR]."""
    parts = [x[:, head, :, : ranks[head // repeats]] for head in range(x.shape[1])]
    return torch.cat(parts, -1)


def dense(q: Tensor, k: Tensor, ranks: list[int]) -> tuple[Tensor, Tensor]:
    every = list(range(len(ranks)))
    return spread(q, ranks, q.shape[2] // k.shape[2], every, max(ranks)), spread(
        k, ranks, 1, every, max(ranks)
    )
