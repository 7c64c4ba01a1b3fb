"""How well two language models foretell a text, side by side: the measure of a rewrite that is meant to differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gaugekit.checkpoint.dtypes import floating, name_of
from gaugekit.report import Report
from gaugekit.text.batches import windows
from gaugekit.text.perplexity import WINDOW, exponential, log_probabilities, window_length
from gaugekit.verbs.verify_runs import Subject


def compare_perplexity(
    a: str | Path | torch.nn.Module,
    b: str | Path | torch.nn.Module,
    text: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    window: int = WINDOW,
    most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """A Report with, of the same windows of a text,

        perplexity_a, perplexity_b   exp of the mean of −log p(token | those before it in its window)
        divergence                   mean KL(p_a ‖ p_b) of the next token's distribution, in nats a token
        agreement                    the share of tokens for which both models hold the same token most likely

    (None for what is not finite), and tokens, windows, window and dtype.

    a, b: directories of causal language models, or live ones, of one vocabulary
    text: a UTF-8 file, read by a's tokenizer and cut into consecutive windows; what is left at the end is not read
    dtype: in which both run; the default is the one most numbers of a are stored in
    window: tokens of a window, at most as many as the model has positions
    most: how many windows are read at most
    progress: is told (windows done, windows in all)

    Memory: both models. Raises ValueError as ``verify``, and for models without logits.
    """
    from gaugekit.hf import loading

    original, result = Subject(a, "a"), Subject(b, "b")
    for subject in (original, result):
        if subject.decodes:
            raise ValueError(f"{subject.argument}: expected a decoder, got an encoder-decoder model")
    tokenizer = None if original.path is None else loading.tokenizer(original.path)
    if tokenizer is None:
        raise ValueError(
            "a: expected a model of a directory with a tokenizer, which reads the text; found none"
        )
    if dtype is not None:
        working = floating(dtype)
    elif original.live is None:
        working = loading.stored_dtype(original.path)
    else:
        working = original.dtype(original.live)
    first, second = original.model(working), result.model(working)
    positions = min(loading.positions(subject.config) for subject in (original, result))
    sequences = windows(tokenizer, text, window_length(window, most, positions), most)
    sums = _Sums()
    for number, sequence in enumerate(sequences):
        sums.add(sequence, log_probabilities(first, sequence), log_probabilities(second, sequence))
        if progress is not None:
            progress(number + 1, len(sequences))
    fields = {
        **sums.fields(),
        "windows": len(sequences),
        "window": len(sequences[0]),
        "dtype": name_of(working),
    }
    return _told(Report("perplexity", fields), a, b)


class _Sums:
    """What is summed over windows."""

    def __init__(self):
        self.tokens, self.losses, self.divergence, self.agreeing = 0, [0.0, 0.0], 0.0, 0.0

    def add(self, sequence: list[int], p: Tensor, q: Tensor) -> None:
        """Counts a window: its tokens, and both models' log-probabilities [T − 1, N] of the next one."""
        if p.shape != q.shape:
            raise ValueError(f"b: expected logits {list(p.shape)} as from a, got {list(q.shape)}")
        target = torch.tensor(sequence[1:], device=p.device)
        for model, logs in enumerate((p, q)):
            self.losses[model] += float(functional.nll_loss(logs, target, reduction="sum"))
        # what a model rules out has no part in its mean, even where the other rules it out too
        self.divergence += float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum())
        agreeing = int((p.argmax(-1) == q.argmax(-1)).sum())
        self.agreeing += math.nan if p.isnan().any() or q.isnan().any() else agreeing
        self.tokens += len(target)

    def fields(self) -> dict[str, float | int | None]:
        first, second = (_finite(exponential(loss / self.tokens)) for loss in self.losses)
        return {
            "perplexity_a": first,
            "perplexity_b": second,
            "divergence": _finite(self.divergence / self.tokens),
            "agreement": _finite(self.agreeing / self.tokens),
            "tokens": self.tokens,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _told(report: Report, a: object, b: object) -> Report:
    fields = report.fields
    first, second, divergence, agreement = (
        "not finite" if fields[name] is None else f"{fields[name]:{form}}"
        for name, form in (
            ("perplexity_a", ".3f"),
            ("perplexity_b", ".3f"),
            ("divergence", ".5f"),
            ("agreement", ".1%"),
        )
    )
    names = [
        "this " + type(model).__name__ if isinstance(model, torch.nn.Module) else str(model)
        for model in (a, b)
    ]
    report.lines = [
        ("perplexity", f"{first} of {names[0]}, {second} of {names[1]}; lower foretells the text better"),
        ("divergence", f"{divergence} nats a token between their forecasts; 0 where they are the same"),
        ("agreement", f"{agreement.replace('%', ' %')} of tokens: both hold the same one most likely"),
        (
            "read",
            f"{fields['tokens']:,} tokens in windows of {fields['window']}, in {fields['dtype']}",
        ),
    ]
    report.done = f"Read a text with {names[0]} and {names[1]}; nothing was written."
    report.next = "gaugekit heal, where the second is meant to come closer" if first != second else ""
    return report
