"""From a checkpoint on disk and what the user asks for to a ``Truncate`` that the engine can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..checkpoint import Checkpoint
from ..models import Layers
from ..statistics import collect
from .search import needed, truncate
from .spectra import spectrum
from .truncation import Truncate


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
    """The rewrite that ``gaugekit.rewrite.convert(source, ...)`` is to be given, its ranks chosen (see ``truncate``).

    For ``rank`` the engine itself calibrates. ``energy`` reads the checkpoint layer by layer, after one streaming pass
    over the ``calibration`` file, resumable in ``work_directory``. ``min_cosine`` needs the file and the whole model in
    memory; every second sentence is held out while it searches. Raises ValueError as ``truncate`` does.
    """
    if sum(x is not None for x in (rank, energy, min_cosine)) != 1:
        raise ValueError("rank, energy, min_cosine: expected one of them, got none or several")
    if rank is not None:
        return Truncate(rank, aware=calibration is not None)
    if min_cosine is not None:
        from ..integrations import loading

        path = loading.directory(source)
        model = loading.model(path, loading.stored_dtype(path))
        found = truncate(model, calibration, min_cosine=min_cosine, progress=progress)
        return Truncate(found["ranks"], aware=True)
    moments = None
    if calibration is not None:
        moments = collect(source, calibration, work_directory=work_directory, progress=progress)
    checkpoint = Checkpoint(source)
    layers = Layers(checkpoint.config, checkpoint.names(), checkpoint.read)
    views = (layers.attention(layer) for layer in range(len(layers)))
    spectra = (spectrum(v, None if moments is None else moments[v.layer]["q"]) for v in views)
    return Truncate(needed(spectra, energy), aware=moments or False)
