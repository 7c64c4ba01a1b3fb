"""What callers give where an operator wants tensors: checked, and numbers and lists made into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Gain: TypeAlias = Tensor | float | Sequence[float]
Integers: TypeAlias = Tensor | Sequence[int]


def check_tensors(**given: Any) -> None:
    """ValueError naming the first of ``given`` that is neither a tensor nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {_kind(value)}")


def gain(name: str, given: Gain | None, heads: int, beside: Tensor) -> Tensor | None:
    """``given`` as a tensor [``heads``] on the device of ``beside``: a number is for all heads, a list has one each.

    Made in float32, or float64 beside float64. A tensor is returned as it is, None too. ValueError for anything else.
    """
    if given is None or isinstance(given, Tensor):
        return given
    dtype = torch.float64 if beside.dtype == torch.float64 else torch.float32
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return torch.full((heads,), given, dtype=dtype, device=beside.device)
    if isinstance(given, (list, tuple)) and all(isinstance(item, (int, float)) for item in given):
        return torch.tensor(given, dtype=dtype, device=beside.device)
    raise ValueError(f"{name}: expected a number, a list of numbers or a tensor [H], got {_kind(given)}")


def gains(a: Tensor, **given: Gain | None) -> list[Tensor | None]:
    """Each of ``given`` as ``gain`` makes it for the heads of ``a`` [B, H, T, ·]."""
    if all(value is None for value in given.values()):
        return list(given.values())
    heads = a.shape[1] if a.dim() == 4 else 0
    return [gain(name, value, heads, a) for name, value in given.items()]


def integers(name: str, given: Integers | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """``given``, a list of integers, as a tensor of ``dtype`` on ``device``; a tensor is returned as it is, None too.

    ValueError for anything else.
    """
    if given is None or isinstance(given, Tensor):
        return given
    if isinstance(given, (list, tuple)) and all(isinstance(item, int) for item in given):
        return torch.tensor(given, dtype=dtype, device=device)
    raise ValueError(f"{name}: expected a list of integers or a tensor of {dtype}, got {_kind(given)}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which torch.autocast has products with ``x`` run: None outside it, for float64, and on a device that
    has none ("meta").
    """
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _kind(value: Any) -> str:
    """What ``value`` is, and for a NumPy array what to do with it."""
    if isinstance(value, np.ndarray):
        return "a NumPy array: torch.from_numpy(array) makes it a tensor"
    return f"a {type(value).__name__}"
