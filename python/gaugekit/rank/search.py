"""``truncate``: the verb, on a live model; and the search for the smallest ranks that keep the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from gaugekit.calibration.moments import Moments, evaluating, observe
from gaugekit.models import AttentionView, Live
from gaugekit.rank.spectra import Spectrum, spectrum
from gaugekit.rank.truncation import Ranks, Truncate, cut
from gaugekit.report import Report, spread
from gaugekit.text import pooling
from gaugekit.text.batches import tokens
from gaugekit.text.sentences import read

STEPS = 10  # halvings: the energy that may go is found to 1.4 %


@torch.no_grad()
def truncate(
    model: nn.Module,
    calibration: str | Path | list[str] | Sequence[dict[str, Moments]] | None = None,
    *,
    rank: int | Ranks | None = None,
    energy: float | None = None,
    min_cosine: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Lowers the rank of the scores of a live transformers model, in place; the same classes, idle channels exactly 0.

    Give one of ``rank`` (one number, or [layer][key head]), ``energy`` (each head keeps that share of its score's
    energy) or ``min_cosine`` (one such share for all heads, the smallest whose mean-pooled embeddings keep that mean
    cosine to the original's on text not used otherwise). ``calibration`` is text (a UTF-8 file or a list of strings)
    or what ``gaugekit.statistics`` collected; None truncates W_Q W_Kᵀ as it stands, 3 to 13 times worse. For
    ``min_cosine`` it is text: sentences 0, 2, 4, … calibrate and 1, 3, 5, … are held out. ``gaugekit.fuse`` or saving
    through ``gaugekit convert`` then makes the model smaller. ``progress(done, total)`` counts that search's steps.

    After the fact this loses accuracy (docs/rank.md); ``gaugekit.heal`` wins some of it back. Returns a Report:
    ``ranks`` [L][G], ``mean_rank``, ``width`` K, ``energy_kept`` [L] (mean over heads), ``mean_cosine`` (held-out, None
    unless searched). Raises ValueError for arguments that do not fit, and for models whose scores have no such freedom.
    """
    if sum(x is not None for x in (rank, energy, min_cosine)) != 1:
        raise ValueError("rank, energy, min_cosine: expected one of them, got none or several")
    live = Live(model)
    held_out: list[str] = []
    if min_cosine is not None:
        if not 0 < min_cosine <= 1:
            raise ValueError(f"min_cosine: expected a cosine in (0, 1], got {min_cosine!r}")
        calibration, held_out = halves(calibration)
    moments = _moments(model, calibration)
    views = [live.attention(layer) for layer in range(len(live))]
    spectra = [spectrum(view, None if moments is None else moments[view.layer]["q"]) for view in views]
    cosine = None
    if rank is not None:
        ranks = [Truncate(rank)._ranks(view) for view in views]
    elif energy is not None:
        ranks = needed(spectra, energy)
    else:
        ranks, cosine = _search(live, views, spectra, tokens(model, held_out, 32), min_cosine, progress)
    _write(live, views, spectra, ranks)
    kept = [fmean(found.shares(here)) for found, here in zip(spectra, ranks, strict=True)]
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


def needed(spectra: Iterable[Spectrum], energy: float) -> Ranks:
    """[L][G]: in each head the smallest rank that keeps the share ``energy``; ValueError unless 0 < energy ≤ 1."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1], got {energy!r}")
    return [found.needed(energy) for found in spectra]


def halves(text: str | Path | list[str] | None) -> tuple[list[str], list[str]]:
    """Sentences 0, 2, 4, … and 1, 3, 5, … of a text; ValueError where there are not two."""
    if text is None or (isinstance(text, list) and text and not isinstance(text[0], str)):
        raise ValueError("calibration: expected text for min_cosine, half of which is held out")
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
    for view, found, here in zip(views, spectra, ranks, strict=True):
        after = view if here == view.ranks else cut(view, found, here)
        live.write(live.family.store(live.config, view.layer, after).tensors)


def _moments(model: nn.Module, calibration) -> Sequence[dict[str, Moments]] | None:
    if calibration is None or (
        isinstance(calibration, list) and calibration and isinstance(calibration[0], dict)
    ):
        return calibration
    return observe(model, calibration)
