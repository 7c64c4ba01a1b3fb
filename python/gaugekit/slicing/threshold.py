"""Which columns of the polar forms to drop: the threshold that foretells best what was not calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gaugekit.nn.shortcuts import DenseShortcut, PolarShortcut
from gaugekit.text.perplexity import log_probabilities

DROPS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)  # thresholds that are tried
HELD_OUT = 8  # windows that follow those of the calibration


def trials(
    directory: Path, sequences: list[list[int]], progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Of each threshold in ``DROPS`` its {"drop", "rank", "loss"}: the columns a shortcut keeps in the mean, and the
    mean of −log p(token | those before it in its window), nats.

    directory: a model sliced in the polar form with all its columns
    sequences: the windows, token ids, none of which the slicing has seen
    progress: is told (windows done, windows in all)
    """
    from gaugekit.hf import loading

    model = loading.model(directory, torch.float32)
    spectra = {
        name: torch.linalg.svd(module.unpack().double().mT, full_matrices=False)[:2]
        for name, module in model.named_modules()
        if isinstance(module, PolarShortcut) and module.rank
    }
    rows = []
    for drop in DROPS:
        ranks = [_shorten(model, name, *spectrum, drop) for name, spectrum in spectra.items()]
        losses = []
        for sequence in sequences:
            target = torch.tensor(sequence[1:])
            losses.append(functional.nll_loss(log_probabilities(model, sequence).cpu(), target))
            if progress is not None:
                progress(len(rows) * len(sequences) + len(losses), len(DROPS) * len(sequences))
        rank = sum(ranks) / max(1, len(ranks))
        rows.append({"drop": drop, "rank": rank, "loss": float(torch.stack(losses).mean())})
    return rows


def best(rows: list[dict[str, Any]]) -> float:
    """The threshold of least loss, of several the one that drops most."""
    return min(rows, key=lambda row: (row["loss"], -row["drop"]))["drop"]


@torch.no_grad()
def _shorten(model: torch.nn.Module, name: str, u: Tensor, singular: Tensor, drop: float) -> int:
    """Puts I − Y Yᵀ with the columns of ``drop`` in the place ``name``; how many it keeps. Y Yᵀ = U (1 − Σ) Uᵀ."""
    short = singular.square()
    short = torch.where(short >= drop, short, 0.0)
    matrix = torch.eye(len(u), dtype=u.dtype) - (u * short) @ u.mT
    shortcut = DenseShortcut(len(u), len(u))
    shortcut.matrix.copy_(matrix)
    model.set_submodule(name, shortcut)
    return int((short > 0).sum())
