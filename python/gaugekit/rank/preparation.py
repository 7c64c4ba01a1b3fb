"""From a checkpoint on disk and what the user asks for to a ``Truncate`` that the engine can run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from gaugekit.calibration.streaming import collect
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.checkpoint.writer import versions
from gaugekit.files.durable import identity
from gaugekit.files.staging import Staging, workplace
from gaugekit.models import Layers
from gaugekit.rank.search import needed, truncate
from gaugekit.rank.spectra import spectrum
from gaugekit.rank.truncation import Ranks, Truncate
from gaugekit.text.sentences import read


def prepare(
    source: str | Path,
    calibration: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    min_cosine: float | None = None,
    work_directory: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Truncate:
    """The rewrite that ``gaugekit.convert(source, ...)`` is to be given, its ranks chosen (see ``truncate``).

    For ``rank`` the engine itself calibrates. ``energy`` reads the checkpoint layer by layer, after one streaming pass
    over the ``calibration`` file. ``min_cosine`` needs the file and the whole model in memory; every second sentence is
    held out while it searches. ``work_directory`` is a new or empty folder, which is locked and marked as this job's:
    what stands there after a kill is gone on from by a call of the same weights, text, arguments and versions. Raises
    ValueError as ``truncate`` and ``gaugekit.statistics`` do.
    """
    if sum(x is not None for x in (rank, energy, min_cosine)) != 1:
        raise ValueError("rank, energy, min_cosine: expected one of them, got none or several")
    if rank is not None:
        return Truncate(rank, aware=calibration is not None)
    if work_directory is None:
        return _prepare(Checkpoint(source), calibration, energy, min_cosine, None, progress)
    checkpoint = Checkpoint(source)
    which = identity(
        "ranks",
        versions("transformers"),
        weights={"source": checkpoint.sha256()},
        text={} if calibration is None else {"calibration": read(calibration)},
        options={"energy": energy, "min_cosine": min_cosine},
    )
    with contextlib.closing(workplace(work_directory, which, {"ranks": None})) as staged:
        return _prepare(checkpoint, calibration, energy, min_cosine, staged, progress)


def _prepare(
    checkpoint: Checkpoint,
    calibration: str | Path | None,
    energy: float | None,
    min_cosine: float | None,
    staged: Staging | None,
    progress: Callable[[int, int], None] | None,
) -> Truncate:
    known = None if staged is None else staged.state["ranks"]
    aware: bool | list = True
    if min_cosine is not None:
        ranks = known or _searched(checkpoint, calibration, min_cosine, progress)
    else:
        moments = None
        if calibration is not None:
            folder = None if staged is None else staged.folder / "statistics"
            moments = collect(checkpoint, calibration, work_directory=folder, progress=progress)
        aware = moments or False
        ranks = known or _needed(checkpoint, moments, energy)
    if staged is not None:
        staged.state["ranks"] = ranks
        staged.save()
    return Truncate(ranks, aware=aware)


def _searched(checkpoint: Checkpoint, calibration, min_cosine: float, progress) -> Ranks:
    from gaugekit.hf import loading

    path = loading.directory(checkpoint.path)
    model = loading.model(path, loading.stored_dtype(path))
    return truncate(model, calibration, min_cosine=min_cosine, progress=progress)["ranks"]


def _needed(checkpoint: Checkpoint, moments: list | None, energy: float) -> Ranks:
    layers = Layers(checkpoint.config, checkpoint.names(), checkpoint.read)
    views = (layers.attention(layer) for layer in range(len(layers)))
    return needed((spectrum(v, None if moments is None else moments[v.layer]["q"]) for v in views), energy)
