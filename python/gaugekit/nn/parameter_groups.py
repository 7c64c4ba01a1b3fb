"""Optimiser groups: weight decay on matrices, none on gains."""

from __future__ import annotations

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict]:
    """Two groups for a torch optimiser: matrices with ``weight_decay``, gains, norms and biases (one axis) without.

    Decay pulls a gain towards 0, which would turn shaped attention off. Parameters that need no gradient are left out;
    shared ones appear once. Raises ValueError for a negative ``weight_decay``.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay: expected at least 0, got {weight_decay}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
