"""``truncate``: the verb, on a live model; and the search for the smallest ranks that keep the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from gaugekit.calibration.moments import Moments, evaluating, observe
from gaugekit.models import AttentionView, Live
from gaugekit.rank.goal import Goal, Ranks, Text, needed
from gaugekit.rank.spectra import Spectrum, spectrum
from gaugekit.rank.truncation import Truncate, cut
from gaugekit.report import Report, spread
from gaugekit.text import pooling
from gaugekit.text.batches import tokens
from gaugekit.text.sentences import read

STEPS = 10  # halvings: the energy that may go is found to 1.4 %


@torch.no_grad()
def truncate(
    model: nn.Module,
    calibration: Text | None = None,
    *,
    moments: Sequence[dict[str, Moments]] | None = None,
    rank: int | Ranks | None = None,
    energy: float | None = None,
    min_cosine: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Lowers the rank of the scores of a live transformers model, in place; the same classes, idle channels exactly 0.

    Give one of ``rank`` (one number, or [layer][key head]), ``energy`` (each head keeps that share of its score's
    energy) or ``min_cosine`` (one such share for all heads, the smallest whose mean-pooled embeddings keep that mean
    cosine to the original's on text not used otherwise). Which channels matter is learnt from ``calibration``, text (a
    UTF-8 file or a list of strings), or from ``moments``, what ``gaugekit.statistics`` collected of such text; with
    neither W_Q W_Kᵀ is truncated as it stands, 3 to 13 times worse. ``min_cosine`` takes text: sentences 0, 2, 4, …
    calibrate and 1, 3, 5, … are held out. ``gaugekit.fuse`` or saving through
    ``gaugekit convert`` then makes the model smaller. ``progress(done, total)`` counts that search's steps.

    After the fact this loses accuracy (docs/rank.md); ``gaugekit.heal`` wins some of it back. Returns a Report:
    ``ranks`` [L][G], ``mean_rank``, ``width`` K, ``energy_kept`` [L] (mean over heads), ``mean_cosine`` (held-out, None
    unless searched). Raises ValueError for arguments that do not fit, and for models whose scores have no such freedom.
    """
    goal = Goal(rank, energy, min_cosine)
    goal.check(calibration, moments)
    live = Live(model)
    held_out: list[str] = []
    if goal.min_cosine is not None:
        calibration, held_out = halves(calibration)
    if calibration is not None:
        moments = observe(model, calibration)
    views = [live.attention(layer) for layer in range(len(live))]
    spectra = [spectrum(view, None if moments is None else moments[view.layer]["q"]) for view in views]
    cosine = None
    if goal.rank is not None:
        ranks = [Truncate(goal.rank)._ranks(view) for view in views]
    elif goal.energy is not None:
        ranks = needed(spectra, goal.energy)
    else:
        ranks, cosine = _search(live, views, spectra, tokens(model, held_out, 32), goal.min_cosine, progress)
    _write(live, views, spectra, ranks)
    kept = [fmean(part.shares(here)) for part, here in zip(spectra, ranks, strict=True)]
    fields = {
        "ranks": ranks,
        "mean_rank": sum(map(sum, ranks)) / sum(map(len, ranks)),
        "width": views[0].k.weight.shape[2],
        "energy_kept": kept,
        "mean_cosine": cosine,
    }
    report = Report("truncate", fields)
    report.lines = [
        (
            "ranks",
            f"{spread([rank for layer in ranks for rank in layer])} of {fields['width']} query and key channels",
        ),
        ("mean rank", f"{fields['mean_rank']:.1f}"),
        ("energy kept", f"{spread(kept)} of a layer's scores, 1 where nothing was lost"),
    ]
    if cosine is not None:
        report.lines.append(
            ("mean cosine", f"{cosine:.5f} on sentences held out, at least {min_cosine:g} asked for")
        )
    report.done = (
        f"Lowered the ranks of {len(ranks)} layers of this {type(model).__name__}; nothing was written."
    )
    report.next = (
        "gaugekit.heal(model, original, text) wins some of it back; gaugekit.fuse(model) makes it smaller"
    )
    return report


def halves(text: Text) -> tuple[list[str], list[str]]:
    """Sentences 0, 2, 4, … and 1, 3, 5, … of a text; ValueError where there are not two."""
    strings = read(text)
    if len(strings) < 2:
        raise ValueError(f"calibration: expected at least 2 sentences for min_cosine, got {len(strings)}")
    return strings[::2], strings[1::2]


@torch.no_grad()
def embeddings(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """The last hidden states averaged over each text's tokens, scaled to length 1: float64 [N, D]."""
    with evaluating(model):
        return torch.cat(
            [
                pooling.embeddings(model.base_model(**inputs).last_hidden_state, inputs["attention_mask"])
                for inputs in batches
            ]
        )


def _search(
    live: Live,
    views: list[AttentionView],
    spectra: list[Spectrum],
    batches: list[dict[str, Tensor]],
    goal: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[Ranks, float]:
    """Halves the interval of log₁₀ of the energy that may go; its lower end always holds the goal."""
    model, low, high = live.model, -6.0, 0.0
    ranks, reached = [view.ranks for view in views], 1.0
    original = embeddings(model, batches)
    try:
        for step in range(STEPS):
            middle = (low + high) / 2
            tried = needed(spectra, 1 - 10**middle)
            _write(live, views, spectra, tried)
            cosine = float((embeddings(model, batches) * original).sum(1).mean())
            if cosine >= goal:
                low, ranks, reached = middle, tried, cosine
            else:
                high = middle
            if progress is not None:
                progress(step + 1, STEPS)
    except BaseException:
        _write(live, views, spectra, [view.ranks for view in views])
        raise
    return ranks, reached


def _write(live: Live, views: list[AttentionView], spectra: list[Spectrum], ranks: Ranks) -> None:
    for view, own, here in zip(views, spectra, ranks, strict=True):
        after = view if here == view.ranks else cut(view, own, here)
        live.write(live.family.store(view.layer, after).tensors)
