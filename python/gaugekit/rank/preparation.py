"""From a checkpoint on disk and what the user asks for to a ``Truncate`` that the engine can run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from gaugekit.calibration.moments import Moments, digest
from gaugekit.calibration.streaming import collect
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.checkpoint.writer import versions
from gaugekit.files.durable import identity
from gaugekit.files.staging import Staging, workplace
from gaugekit.models import Layers
from gaugekit.rank.goal import Goal, Ranks, Text, needed
from gaugekit.rank.search import truncate
from gaugekit.rank.spectra import spectrum
from gaugekit.rank.truncation import Truncate
from gaugekit.text.sentences import read


def prepare(
    source: str | Path,
    calibration: Text | None = None,
    *,
    moments: Sequence[dict[str, Moments]] | None = None,
    rank: int | Ranks | None = None,
    energy: float | None = None,
    min_cosine: float | None = None,
    work_directory: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Truncate:
    """The rewrite that ``gaugekit.convert(source, ...)`` is to be given, its ranks chosen (see ``truncate``).

    ``calibration`` is text, ``moments`` what ``gaugekit.statistics`` collected of it. For ``rank`` with text the engine
    itself calibrates. ``energy`` reads the checkpoint layer by layer, after one streaming pass over the text.
    ``min_cosine`` needs text and the whole model in memory; every second sentence is held out while it searches.
    ``work_directory`` is a new or empty folder, which is locked and marked as this job's:
    what stands there after a kill is gone on from by a call of the same weights, text, arguments and versions. Raises
    ValueError as ``truncate`` and ``gaugekit.statistics`` do.
    """
    goal = Goal(rank, energy, min_cosine)
    goal.check(calibration, moments)
    if goal.rank is not None:
        return Truncate(goal.rank, aware=calibration is not None, moments=moments)
    checkpoint = Checkpoint(source)
    if work_directory is None:
        return _prepare(checkpoint, calibration, moments, goal, None, progress)
    which = identity(
        "ranks",
        versions("transformers"),
        weights={"source": checkpoint.sha256(), **({} if moments is None else {"moments": digest(moments)})},
        text={} if calibration is None else {"calibration": read(calibration)},
        options=goal.options,
    )
    with contextlib.closing(workplace(work_directory, which, {"ranks": None})) as staged:
        return _prepare(checkpoint, calibration, moments, goal, staged, progress)


def _prepare(
    checkpoint: Checkpoint,
    calibration: Text | None,
    moments: Sequence[dict[str, Moments]] | None,
    goal: Goal,
    staged: Staging | None,
    progress: Callable[[int, int], None] | None,
) -> Truncate:
    known = None if staged is None else staged.state["ranks"]
    if goal.min_cosine is not None:
        ranks = known or _searched(checkpoint, calibration, goal.min_cosine, progress)
        rewrite = Truncate(ranks, aware=True)
    else:
        if calibration is not None:
            folder = None if staged is None else staged.folder / "statistics"
            moments = collect(checkpoint, calibration, work_directory=folder, progress=progress)
        ranks = known or _needed(checkpoint, moments, goal.energy)
        rewrite = Truncate(ranks, moments=moments)
    if staged is not None:
        staged.state["ranks"] = ranks
        staged.save()
    return rewrite


def _searched(checkpoint: Checkpoint, calibration, min_cosine: float, progress) -> Ranks:
    from gaugekit.hf import loading

    path = loading.directory(checkpoint.path)
    model = loading.model(path, loading.stored_dtype(path))
    return truncate(model, calibration, min_cosine=min_cosine, progress=progress)["ranks"]


def _needed(checkpoint: Checkpoint, moments: Sequence[dict[str, Moments]] | None, energy: float) -> Ranks:
    layers = Layers(checkpoint.config, checkpoint.names(), checkpoint.read)
    views = (layers.attention(layer) for layer in range(len(layers)))
    return needed((spectrum(v, None if moments is None else moments[v.layer]["q"]) for v in views), energy)
