"""Text as a model reads it: token ids, cut to the positions a model has, in padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gaugekit.text.sentences import content, read


def tokenize(tokenizer: Callable, text: list[str], longest: int) -> list[list[int]]:
    """The ids of each string, cut to ``longest`` tokens; strings without a token are left out."""
    ids = tokenizer(text, truncation=True, max_length=longest, padding=False)["input_ids"]
    return [list(sequence) for sequence in ids if len(sequence)]


def token_ids(
    tokenizer: Callable,
    text: str | Path | list[str],
    longest: int,
    *,
    most: int | None = None,
    argument: str = "text",
) -> list[list[int]]:
    """``tokenize`` of a file or a list of strings, as ``read`` takes them; ``most`` tokens of it in all.

    Raises ValueError as ``read`` does, and, naming the caller's ``argument``, where there is no token.
    """
    sequences = tokenize(tokenizer, read(text), longest)
    if most is not None:
        cut, left = [], most
        for sequence in sequences:
            if left > 0:
                cut.append(sequence[:left])
                left -= len(sequence)
        sequences = cut
    if not sequences:
        raise ValueError(f"{argument}: expected text that gives tokens, got none")
    return sequences


def windows(
    tokenizer: Callable, text: str | Path, length: int, most: int | None = None, *, argument: str = "text"
) -> list[list[int]]:
    """The ids of a UTF-8 file in consecutive windows of ``length`` tokens, at most ``most`` of them.

    What is left at the end, shorter than a window, is left out, unless there is nothing else. Raises ValueError, naming
    the caller's ``argument``, for a file that is missing or not UTF-8, and where there are no two tokens.
    """
    ids = tokenizer(content(text, argument))["input_ids"]
    whole = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:most]
    if len(ids) < 2:
        raise ValueError(f"{argument}: expected text of two tokens at least, got {len(ids)}")
    return whole or [ids]


def padding(config: Any) -> int:
    """The id that pads a model's input; 0 where its config names none."""
    return getattr(config, "pad_token_id", None) or 0


def batches(
    sequences: list[list[int]], batch_size: int, pad: int = 0, tokens: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, mask), int64 [B, T] each, ``batch_size`` sequences at a time, padded on the right with ``pad``.

    With ``tokens`` a batch has at most that many positions, B T, where one sequence alone does not pass it. Sequences
    of like length go together, the shortest first: nothing depends on the order, and little is spent on padding.
    """
    ordered = sorted(sequences, key=len)
    start = 0
    while start < len(ordered):
        stop = min(start + batch_size, len(ordered))
        while tokens is not None and stop - start > 1 and (stop - start) * len(ordered[stop - 1]) > tokens:
            stop -= 1
        chunk = ordered[start:stop]
        start = stop
        ids = torch.full((len(chunk), len(chunk[-1])), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(chunk):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        yield ids, mask


def tokens(
    model: torch.nn.Module, text: str | Path | list[str], batch_size: int = 8
) -> list[dict[str, torch.Tensor]]:
    """The text as batches of ``input_ids`` and ``attention_mask`` [B, T] on the model's device.

    Raises ValueError where no tokenizer stands in the directory the model was loaded from, and for bad text.
    """
    from gaugekit.hf import loading

    path = loading.home(model)
    tokenizer = None if path is None else loading.tokenizer(path)
    if tokenizer is None:
        raise ValueError("text: expected a model loaded from a directory with a tokenizer, found none")
    sequences = token_ids(tokenizer, text, loading.positions(model.config))
    device = next(model.parameters()).device
    return [
        {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        for ids, mask in batches(sequences, batch_size, padding(model.config))
    ]
