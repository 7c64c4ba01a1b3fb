"""Rows of sequences that grow: what is accepted, a buffer to append to, and the positions they stand at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from gaugekit.ops.operands import Integers, check_tensors, integers

if TYPE_CHECKING:
    from gaugekit.nn.cache import LayerCache


def append(old: Tensor | None, new: Tensor, columns: int, start: Tensor | None) -> Tensor:
    """A buffer that holds the first ``columns`` rows of ``old`` [B, ·, S, ·] and then ``new`` [B, ·, T, ·].

    With ``start`` int64 [B] the new rows of sequence b stand at start[b]. The buffer is ``old`` where it has room and
    no gradient flows, else a larger one; without ``old`` it is ``new`` itself, which is therefore never written to.
    """
    if old is None:
        return new
    end = columns + new.shape[2]
    if end > old.shape[2] or old.requires_grad or new.requires_grad:
        old = pad(old[:, :, :columns], (0, 0, 0, end + end // 4 - columns))
    if start is None:
        old[:, :, columns:end] = new
        return old
    row = start[:, None] + torch.arange(new.shape[2], device=new.device)
    return old.scatter_(2, row[:, None, :, None].expand_as(new), new)


def check_rows(x: Tensor, width: int, lengths: Integers | None) -> Tensor | None:
    """``lengths`` as a tensor; ValueError unless x is [B, T, width] and ``lengths`` None, a list or int64 [B], of 0..T
    (not read on a GPU)."""
    check_tensors(x=x)
    lengths = integers("lengths", lengths, torch.int64, x.device)
    if x.dim() != 3 or x.shape[2] != width:
        raise ValueError(f"x: expected [B, T, {width}], got {list(x.shape)}")
    if lengths is not None and (lengths.dtype != torch.int64 or lengths.shape != x.shape[:1]):
        raise ValueError(
            f"lengths: expected int64 [B] = [{x.shape[0]}], got {lengths.dtype} {list(lengths.shape)}"
        )
    if lengths is not None and lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = [n for n in lengths.tolist() if not 0 <= n <= x.shape[1]]
        if wrong:
            raise ValueError(f"lengths: expected 0 to T = {x.shape[1]}, got {wrong[0]}")
    return lengths


def check_positions(x: Tensor, positions: Integers | None, rotary_base: float | None) -> Tensor | None:
    """``positions`` as a tensor on the device of x; ValueError where nothing is turned by them."""
    if positions is not None and rotary_base is None:
        raise ValueError(
            "positions: expected None without rotary_base, since they are for the rotation alone"
        )
    return integers("positions", positions, torch.int64, x.device)


def positions_of(rows: int, cache: LayerCache | None, device: torch.device) -> Tensor:
    """The positions of ``rows`` new rows after what a LayerCache (or None) holds: int64 [T], or [B, T] where its
    sequences differ in length."""
    t = torch.arange(rows, device=device)
    if cache is None:
        return t
    return t + (cache.columns if cache.lengths is None else cache.lengths[:, None])
