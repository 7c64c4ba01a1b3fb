"""What a layer keeps while it decodes: keys, values, and the running sum that C needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gaugekit.nn.rows import append


class Step(NamedTuple):
    """What one call of attention sees: arguments of ``gaugekit.shaped_attention``, and C's rows for its queries."""

    keys: Tensor
    values: Tensor
    query_start: Tensor | None
    key_lengths: Tensor | None
    mean: Tensor | None


class LayerCache:
    """Keys [B, G, S, K] and values [B, H, S, V] of one layer, in buffers that grow by a quarter when they are full.

    Sequences may differ in length: those of ``lengths`` [B] real rows stand at the front of each (right padding), and
    what follows is finite and unseen; None means that all have S. ``total`` [B, H, V] is the float32 (float64) sum of
    the values so far, so that the mean over a prefix costs the new rows and not the cache.
    """

    def __init__(self):
        self.keys = self.values = self.total = self.lengths = None
        self.columns = 0

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None, mean: bool = True) -> Step:
        """Adds k [B, G, T, K], v [B, H, T, V], of which ``lengths`` [B] (None: T) rows at the front are real.

        With ``mean`` the step holds the mean of the values up to each new row, [B, H, T, V], once there is a past; the
        first call leaves it to the attention, which has all rows at hand.
        """
        before, start, rows = self.columns, self.lengths, k.shape[2]
        if lengths is not None and start is None:
            start = torch.full_like(lengths, before)
        self.keys = append(self.keys, k, before, start)
        self.values = append(self.values, v, before, start)
        self.columns = before + rows
        first = before if start is None else start[:, None, None, None]
        means = self._sum(v, first, lengths) if mean else None
        if start is not None:
            self.lengths = start + (rows if lengths is None else lengths)
        keys, values = self.keys[:, :, : self.columns], self.values[:, :, : self.columns]
        return Step(keys, values, start if before else None, self.lengths, means if before else None)

    def _sum(self, v: Tensor, start: int | Tensor, lengths: Tensor | None) -> Tensor:
        x = v.to(torch.float64 if v.dtype == torch.float64 else torch.float32)
        t = torch.arange(v.shape[2], device=v.device)[:, None]
        if lengths is not None:
            x = torch.where(t < lengths[:, None, None, None], x, 0)
        past = 0 if self.total is None else self.total[:, :, None]
        sums = past + (x if v.shape[2] == 1 else x.cumsum(2))
        self.total = (past + x.sum(2, keepdim=True))[:, :, 0]
        return (sums / (start + t + 1)).to(v.dtype)

    def select(self, index: Tensor) -> None:
        """Keeps sequences ``index`` int64 [B'] in this order: beams that go on, or prompts repeated."""
        for name in ("keys", "values", "total", "lengths"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x.index_select(0, index.to(x.device)))

    def crop(self, rows: int) -> None:
        """Forgets the last ``rows`` rows of every sequence; ValueError where that is more than there are."""
        if not 0 <= rows <= self.columns:
            raise ValueError(f"rows: expected 0 to {self.columns}, got {rows}")
        self.columns -= rows
        self.keys, self.values = (x[:, :, : self.columns] for x in (self.keys, self.values))
        if self.lengths is not None:
            self.lengths = self.lengths - rows
        if self.total is not None:
            self.total = None
            self._sum(self.values, 0, self.lengths)
