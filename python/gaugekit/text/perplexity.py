"""Perplexity: how well a language model foretells a text, the measure of what a rewrite that is not exact did to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gaugekit.text.batches import windows

WINDOW = 512


def perplexity(
    model: torch.nn.Module,
    text: str | Path,
    *,
    tokenizer: Callable | None = None,
    window: int = WINDOW,
    most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean of −log p(token | those before it in its window) over a text; 1 would be foreknowledge.

    model: a causal language model (its output has logits), in evaluation mode, on any device
    text: a UTF-8 file, cut into consecutive windows of ``window`` tokens (fewer where the model has not so many
        positions); what is left at the end is not read. The first token of a window is foretold by nothing and left out
    tokenizer: that of the directory the model was loaded from, unless given
    most: how many windows are read at most
    progress: is told (windows done, windows in all)

    Raises ValueError for a model without logits or a tokenizer, and for a text that cannot be read.
    """
    from gaugekit.hf import loading

    if tokenizer is None:
        path = loading.home(model)
        tokenizer = None if path is None else loading.tokenizer(path)
        if tokenizer is None:
            raise ValueError(
                "tokenizer: expected one, or a model loaded from a directory that has one; got none"
            )
    sequences = windows(tokenizer, text, min(window, loading.positions(model.config)), most)
    total, count = 0.0, 0
    for number, sequence in enumerate(sequences):
        target = torch.tensor(sequence[1:])
        total += float(functional.nll_loss(log_probabilities(model, sequence).cpu(), target, reduction="sum"))
        count += len(target)
        if progress is not None:
            progress(number + 1, len(sequences))
    return math.exp(total / count)


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, sequence: list[int]) -> Tensor:
    """log p of every token after each of ``sequence`` [T] but the last: [T − 1, N], float64, on the model's device.

    Raises ValueError for a model without logits [B, T, N].
    """
    ids = torch.tensor([sequence], device=next(model.parameters()).device)
    output: Any = model(input_ids=ids, use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"model: expected a causal language model (logits [B, T, N]), got {type(model).__name__}"
        )
    return logits[0, :-1].double().log_softmax(-1)
