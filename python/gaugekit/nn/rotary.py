"""Rotary position embedding: pairs of channels turned by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """x [B, H, T, K], K even, turned: channels (i, i + K/2) by the angle position · base^(−2i/K), as Llama pairs them.

    ``positions`` is int64 [T] or [B, T]. Angles are float32 (float64 for float64 x); the result has x's dtype.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = positions[..., None].to(dtype) * frequency
    angle = angle[:, None] if positions.dim() == 2 else angle
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
