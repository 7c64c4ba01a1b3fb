"""Compact forms put into a live model, and what ``unfuse`` needs to know of a model that was fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gaugekit.nn import forms

RECORD = "_gaugekit_fused"


def install(model: nn.Module, modules: dict[str, dict], dtype: torch.dtype | None = None) -> list[str]:
    """Replaces the modules named in ``modules`` by their forms, on the device torch is set to (meta, while loading).

    Returns the paths in the model where they stand now.

    Raises ValueError where the model has no module of that name, bare or behind its base model's prefix. Where that is
    not all that stands before it (OPT's blocks are in a decoder of the base model), the one module counts that ends so.
    """
    prefixes = ("", f"{model.base_model_prefix}.")
    present = {name for name, _ in model.named_modules()}
    paths = []
    for name, spec in modules.items():
        path = next((prefix + name for prefix in prefixes if prefix + name in present), None)
        if path is None:
            ends = [known for known in present if known.endswith(f".{name}")]
            path = ends[0] if len(ends) == 1 else None
        if path is None:
            raise ValueError(
                f"quantization_config: expected a module {name!r} in {type(model).__name__}, got none; "
                "was the checkpoint converted from another architecture?"
            )
        model.set_submodule(path, forms.build(spec, dtype=dtype))
        paths.append(path)
    return paths


def remember(model: nn.Module, steps: Sequence[Any]) -> None:
    """Keeps the ``steps`` that fused ``model`` on the instance, as plain data that no state_dict shows; each has
    ``undo(model)``.
    """
    model.__dict__[RECORD] = list(steps)


def fused(model: nn.Module) -> bool:
    """Whether the instance remembers steps that fused it."""
    return RECORD in model.__dict__


def undo(model: nn.Module) -> list[str]:
    """Takes back what was remembered, the last step first; the names of the modules that were put back."""
    steps = model.__dict__.pop(RECORD, [])
    return [name for step in reversed(steps) for name in step.undo(model)]
