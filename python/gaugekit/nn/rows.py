"""Rows of sequences that grow: what is accepted, and a buffer to append to."""

from __future__ import annotations

import torch
from torch import Tensor

from gaugekit.ops.operands import Integers, check_tensors, integers


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
