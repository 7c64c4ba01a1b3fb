"""The operands of shaped attention: what is accepted, and which keys a query sees.

Both terms, A and C, obey one mask. Query t of sequence b stands at position p = query_start[b] + t and sees the keys of
one interval; each key, turned around, is seen by the queries of one interval. ``check`` refuses what does not fit,
``Mask`` holds the five arguments of the mask, ``keys_of_queries`` and ``queries_of_keys`` give the intervals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gaugekit.ops.operands import Integers, integers


class Mask(NamedTuple):
    """The mask arguments of ``shaped_attention``, in the operators' order (see there for their meaning)."""

    causal: bool = False
    window: int | None = None
    query_start: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(
        cls,
        device: torch.device,
        causal: bool,
        window: int | None,
        query_start: Integers | None,
        key_lengths: Integers | None,
        cu_seqlens: Integers | None,
    ) -> Mask:
        """The mask of what a caller gave: lists of integers become tensors on ``device``."""
        if query_start is None and key_lengths is None and cu_seqlens is None:
            return cls(causal, window)
        return cls(
            causal,
            window,
            integers("query_start", query_start, torch.int64, device),
            integers("key_lengths", key_lengths, torch.int64, device),
            integers("cu_seqlens", cu_seqlens, torch.int32, device),
        )

    def check(self, batch: int, queries: int, keys: int) -> None:
        """ValueError naming the argument that does not fit [batch, ·, queries, ·] beside [batch, ·, keys, ·]."""
        if self.window is not None and (isinstance(self.window, (bool, float)) or self.window < 1):
            raise ValueError(f"window: expected None or an integer of at least 1, got {self.window}")
        for name, given in (("query_start", self.query_start), ("key_lengths", self.key_lengths)):
            if given is not None and (given.dtype != torch.int64 or given.shape != (batch,)):
                raise ValueError(
                    f"{name}: expected int64 of shape [B] = [{batch}], got {given.dtype} {list(given.shape)}"
                )
        bounds = self.cu_seqlens
        if bounds is None:
            return self._check_lengths(keys)
        if self.query_start is not None or self.key_lengths is not None:
            raise ValueError("cu_seqlens: expected without query_start and key_lengths, got them together")
        if bounds.dtype != torch.int32 or bounds.dim() != 1 or bounds.numel() < 2:
            raise ValueError(
                f"cu_seqlens: expected int32 of shape [N+1], got {bounds.dtype} {list(bounds.shape)}"
            )
        if batch != 1 or queries != keys:
            raise ValueError(
                f"cu_seqlens: expected B = 1 and T = S, got B = {batch}, T = {queries}, S = {keys}"
            )
        if bounds.device.type == "cpu" and not torch.compiler.is_compiling():
            values = bounds.tolist()
            if values[0] != 0 or values[-1] != queries or values != sorted(values):
                raise ValueError(f"cu_seqlens: expected values rising from 0 to T = {queries}, got {values}")

    def _check_lengths(self, keys: int) -> None:
        # On a GPU reading the lengths would stop the stream; there they are clamped.
        lengths = self.key_lengths
        if lengths is None or lengths.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > keys):
            raise ValueError(f"key_lengths: expected values in 0..S = {keys}, got {lengths.tolist()}")


def check(
    a: Tensor, v: Tensor, alpha: Tensor | None, beta: Tensor | None, gamma: Tensor | None, v0: Tensor | None,
    lam: Tensor | None, mask: Mask,
) -> None:  # fmt: skip
    """ValueError naming the argument that does not fit ``a`` [B, H, T, ·]; shared by both operators."""
    if a.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"v: expected [B, G, S, V] beside [B, H, T, ·], got {list(v.shape)} beside {list(a.shape)}"
        )
    (batch, heads, queries, _), (groups, keys, width) = a.shape, v.shape[1:]
    if a.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, float64, bfloat16 or float16, got {a.dtype}")
    if v.shape[0] != batch or groups < 1 or heads < 1 or heads % groups:
        raise ValueError(
            f"v: expected [B, G, S, V], B = {batch}, G dividing H = {heads}, got {list(v.shape)}"
        )
    if (v0 is None) != (lam is None):
        raise ValueError(
            f"{'lam' if lam is None else 'v0'}: expected beside {'v0' if lam is None else 'lam'}, got None"
        )
    for name, x in (("v", v), ("v0", v0)):
        if x is not None and (x.dtype != a.dtype or x.device != a.device):
            raise ValueError(f"{name}: expected {a.dtype} on {a.device}, got {x.dtype} on {x.device}")
    if v0 is not None and v0.shape != (batch, groups, queries, width):
        raise ValueError(
            f"v0: expected [B, G, T, V] = {[batch, groups, queries, width]}, got {list(v0.shape)}"
        )
    check_gains(a, mask.causal, keys, alpha=alpha, beta=beta, gamma=gamma, lam=lam)
    mask.check(batch, queries, keys)


def check_gains(a: Tensor, causal: bool, keys: int, **given: Tensor | None) -> None:
    """ValueError naming the gain that does not fit the heads of ``a`` [B, H, T, ·], or its mask and number of keys."""
    if all(gain is None for gain in given.values()):
        return
    heads, queries = a.shape[1:3]
    for name, gain in given.items():
        if gain is not None and (gain.shape != (heads,) or gain.dtype not in (torch.float32, a.dtype)):
            raise ValueError(
                f"{name}: expected [H] = [{heads}], float32 or {a.dtype}, got {list(gain.shape)}, {gain.dtype}"
            )
    if not causal and queries != keys and any(given.get(name) is not None for name in ("alpha", "lam")):
        raise ValueError(f"alpha, lam: expected T = S without causal, got T = {queries}, S = {keys}")


class Intervals(NamedTuple):
    """For each row of one kind (queries or keys), the rows ``first`` ≤ · < ``last`` of the other kind.

    ``own`` is the row of the other kind at the same position, 0 where there is none (``has_own``). All [B or 1, rows].
    """

    first: Tensor
    last: Tensor
    own: Tensor
    has_own: Tensor


def keys_of_queries(queries: int, keys: int, mask: Mask, device: torch.device) -> Intervals:
    """The keys each of the ``queries`` rows sees, and the key row at its position."""
    t, offset, start, length, _ = _layout(queries, queries, keys, mask, device)
    p = start + t
    real = (p >= 0) & (p < length)
    first, last = torch.zeros_like(p), length.expand_as(real)
    if mask.causal:
        last = torch.where(real, p + 1, 0)
    if mask.window is not None:
        first = (p - mask.window + 1).clamp(min=0)
        last = torch.minimum(last, p + mask.window)
    return _intervals(first, last, last > first, p, real, offset)


def queries_of_keys(queries: int, keys: int, mask: Mask, device: torch.device) -> Intervals:
    """The queries that see each of the ``keys`` rows, and the query row at its position."""
    j, offset, start, length, count = _layout(keys, queries, keys, mask, device)
    t = j - start
    real = (j < length).expand_as(t + length)
    first, last = torch.zeros_like(t), count.expand_as(real)
    if mask.causal:
        first, last = t.clamp(min=0), torch.minimum(last, length - start)
    elif mask.window is not None:
        first = (t - mask.window + 1).clamp(min=0)
    if mask.window is not None:
        last = torch.minimum(last, t + mask.window)
    return _intervals(first, last, real & (last > first), t, real & (t >= 0) & (t < count), offset)


def sums(x: Tensor, intervals: Intervals, dtype: torch.dtype) -> Tensor:
    """Sums of x's rows over each interval, as differences of prefix sums.

    The prefixes are float64: the difference of two long float32 sums would lose what a short interval holds.
    """
    prefix = torch.nn.functional.pad(x.double().cumsum(2), (0, 0, 1, 0))
    return (gather(prefix, intervals.last) - gather(prefix, intervals.first)).to(dtype)


def gather(x: Tensor, row: Tensor) -> Tensor:
    """x[b, g, row[b, t], :] for row [B or 1, t]."""
    if x.shape[2] == 0:
        return x.new_zeros(*x.shape[:2], row.shape[1], x.shape[3])
    return x.gather(2, row[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3]))


def _layout(rows: int, queries: int, keys: int, mask: Mask, device: torch.device) -> tuple[Tensor, ...]:
    """Of each row, [B or 1, rows]: its index in its sequence, and of that sequence the first row, the position of the
    first query, the number of keys and the number of queries."""
    row = torch.arange(rows, device=device)[None]
    number = torch.zeros_like(row)
    if mask.cu_seqlens is not None:
        bounds = mask.cu_seqlens.long()
        sequence = torch.searchsorted(bounds[1:].contiguous(), row, right=True).clamp(max=len(bounds) - 2)
        length = (bounds[1:] - bounds[:-1])[sequence]
        return row - bounds[sequence], bounds[sequence], number, length, length
    start = number + (keys - queries if mask.causal else 0)
    if mask.query_start is not None:
        start = number + mask.query_start[:, None]
    length = number + keys if mask.key_lengths is None else number + mask.key_lengths.clamp(0, keys)[:, None]
    return row, number, start, length, number + queries


def _intervals(first, last, seen, own, has_own, offset) -> Intervals:
    here = [torch.where(seen, x + offset, 0) for x in (first, last)]
    return Intervals(*here, torch.where(has_own, own + offset, 0), has_own)
