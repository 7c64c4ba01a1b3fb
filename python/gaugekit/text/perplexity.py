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

    Infinite where a float holds no such number, NaN where the model's logits are. Raises ValueError for a model without
    logits or a tokenizer, a tokenizer of another vocabulary, and a text that cannot be read.
    """
    from gaugekit.hf import loading

    if tokenizer is None:
        path = loading.home(model)
        tokenizer = None if path is None else loading.tokenizer(path)
        if tokenizer is None:
            raise ValueError(
                "tokenizer: expected one, or a model loaded from a directory that has one; got none"
            )
    length = window_length(window, most, loading.positions(model.config))
    sequences = windows(tokenizer, text, length, most)
    total, count = 0.0, 0
    for number, sequence in enumerate(sequences):
        target = torch.tensor(sequence[1:])
        total += float(functional.nll_loss(log_probabilities(model, sequence).cpu(), target, reduction="sum"))
        count += len(target)
        if progress is not None:
            progress(number + 1, len(sequences))
    return exponential(total / count)


def window_length(window: int, most: int | None, positions: int) -> int:
    """The tokens of a window, for models of ``positions``; ValueError for what is none, or too few to foretell one."""
    for name, count, least in (("window", window, 2), ("most", most, 1)):
        counted = isinstance(count, int) and not isinstance(count, bool) and count >= least
        if not counted and not (name == "most" and count is None):
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {count!r}")
    if positions < 2:
        raise ValueError(f"model: expected two positions at least, got {positions}")
    return min(window, positions)


def exponential(mean: float) -> float:
    """exp; infinity where it is beyond a float, NaN of NaN."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, sequence: list[int]) -> Tensor:
    """log p of every token after each of ``sequence`` [T] but the last: [T − 1, N], float64, on the model's device.

    Raises ValueError for a model without logits [B, T, N], or without one of these tokens.
    """
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    if known is not None and max(sequence) >= known:
        raise ValueError(
            f"text: expected tokens of the model's vocabulary of {known}, got token {max(sequence)}"
        )
    ids = torch.tensor([sequence], device=next(model.parameters()).device)
    output: Any = model(input_ids=ids, use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"model: expected a causal language model (logits [B, T, N]), got {type(model).__name__}"
        )
    return logits[0, :-1].double().log_softmax(-1)
