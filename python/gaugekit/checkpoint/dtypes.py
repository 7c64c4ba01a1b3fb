"""The floating types weights are stored and run in, by the names a user gives them."""

from __future__ import annotations

import torch

FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NAMES = (*FLOATS, *SHORT)


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, as config.json has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def floating(dtype: str | torch.dtype) -> torch.dtype:
    """The floating type that ``dtype`` is or names; ValueError for any other."""
    name = name_of(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in NAMES:
        raise ValueError(f"dtype: expected one of {', '.join(NAMES)}; got {dtype!r}")
    return FLOATS[SHORT.get(name, name)]
