"""What a layer keeps while it decodes: keys, values, and the running sum that C needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Step(NamedTuple):
    """What one call sees: arguments of ``gaugekit.shaped_attention``, and C's row."""

    keys: Tensor
    values: Tensor | None
    query_start: Tensor | None
    key_lengths: Tensor | None
    mean: Tensor | None


def append(old: Tensor | None, new: Tensor, columns: int, start: Tensor | None) -> Tensor:
    """A buffer that holds the first ``columns`` rows of ``old`` [B, ·, S, ·] and then ``new`` [B, ·, T, ·].

    With ``start`` int64 [B] the new rows of sequence b stand at start[b]. The buffer is ``old`` where it has room and
    no gradient flows, else a larger one; without ``old`` it is ``new`` itself, which is therefore never written to.
    What was made in inference mode cannot be written to outside of it, and is copied there, too.
    """
    if old is None:
        return new
    end = columns + new.shape[2]
    sealed = old.is_inference() and not torch.is_inference_mode_enabled()
    if end > old.shape[2] or old.requires_grad or new.requires_grad or sealed:
        old = pad(old[:, :, :columns], (0, 0, 0, end + end // 4 - columns))
    if start is None:
        old[:, :, columns:end] = new
        return old
    return put_rows(old, start[:, None] + torch.arange(new.shape[2], device=new.device), new)


def put_rows(buffer: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Writes ``new`` [B, G, T, ·] to the rows ``rows`` int64 [B, T], 0 to S − 1, of ``buffer`` [B, G, S, ·]: returned.

    ``scatter_`` would copy the whole buffer in 16 bits: on a CPU 20 ms for 25 MB, to write four rows.
    """
    sequence = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
    buffer.transpose(1, 2).index_put_((sequence, rows), new.transpose(1, 2))
    return buffer


class LayerCache:
    """Keys [B, G, S, K] and values [B, H, S, V] of one layer, in buffers that grow by a quarter when they are full.

    Sequences may differ in length: those of ``lengths`` [B] real rows stand at the front of each (right padding), and
    what follows is finite and unseen; None means that all have S. ``total`` [B, H, V] is the float32 (float64) sum of
    the values so far, so that a step of one row has its mean without reading the cache. Where keys and values are both
    read off one tensor (``gaugekit.single_cache_attention``), ``keys`` holds that, and ``values`` stays None.
    """

    def __init__(self):
        self.keys = self.values = self.total = self.lengths = None
        self.columns = 0

    def append(self, k: Tensor, v: Tensor | None, lengths: Tensor | None = None, mean: bool = True) -> Step:
        """Adds k [B, G, T, K], v [B, H, T, V], of which ``lengths`` [B] (None: T) rows at the front are real.

        Without v, k alone, and no mean; ValueError where that differs from what the cache holds. With ``mean``, and for
        T = 1, the step holds the mean of the values up to the new row, [B, H, 1, V]. For several rows at once (a chunk
        of a prompt) the attention takes the means itself, in one more reading of the cache.
        """
        if self.keys is not None and (v is None) != (self.values is None):
            held, given = ("one tensor", "keys and values")[:: 1 if self.values is None else -1]
            raise ValueError(
                f"cache: expected one that holds {given} a layer, got {held}: it was begun before the model was fused "
                "or unfused; begin another"
            )
        before, start, rows = self.columns, self.lengths, k.shape[2]
        if lengths is not None and start is None:
            start = torch.full_like(lengths, before)
        self.keys = append(self.keys, k, before, start)
        self.values = None if v is None else append(self.values, v, before, start)
        self.columns = before + rows
        if start is not None:
            self.lengths = start + (rows if lengths is None else lengths)
        means = None
        if mean and v is not None:
            self.total = self._sum(v, lengths) + (0 if self.total is None else self.total)
            if before and rows == 1:
                count = self.columns if start is None else self.lengths.clamp(min=1)[:, None, None]
                means = (self.total / count).to(v.dtype)[:, :, None]
        keys = self.keys[:, :, : self.columns]
        values = None if v is None else self.values[:, :, : self.columns]
        return Step(keys, values, start if before else None, self.lengths, means)

    @staticmethod
    def _sum(v: Tensor, lengths: Tensor | None) -> Tensor:
        x = v.to(torch.float64 if v.dtype == torch.float64 else torch.float32)
        if lengths is not None:
            real = torch.arange(v.shape[2], device=v.device) < lengths[:, None]
            x = torch.where(real[:, None, :, None], x, 0)
        return x.sum(2)

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
        self.keys = self.keys[:, :, : self.columns]
        self.values = None if self.values is None else self.values[:, :, : self.columns]
        if self.lengths is not None:
            self.lengths = self.lengths - rows
        if self.total is not None:
            self.total = self._sum(self.values, self.lengths)


def positions_of(rows: int, cache: LayerCache | None, device: torch.device) -> Tensor:
    """The positions of ``rows`` new rows after what a LayerCache (or None) holds: int64 [T], or [B, T] where its
    sequences differ in length."""
    t = torch.arange(rows, device=device)
    if cache is None:
        return t
    return t + (cache.columns if cache.lengths is None else cache.lengths[:, None])
