"""Rewrites a checkpoint on disk: what a user asks for, joined with the text that calibrates it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gaugekit.calibration import collect
from gaugekit.checkpoint.dtypes import floating
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.files.durable import sha256
from gaugekit.files.ranks import Ranks
from gaugekit.report import Report
from gaugekit.rewrite import Calibration, Later, Rewrite, engine
from gaugekit.rewrite.job import Job
from gaugekit.verbs import wording

NOBODY_ASKS = (
    "calibration: expected beside a rewrite that asks for statistics (a rank or its goal), got it alone"
)


def convert(
    source: str | Path,
    target: str | Path,
    rewrites: Sequence[Rewrite] | Later,
    *,
    dense: bool = False,
    dtype: str | torch.dtype | None = None,
    calibration: str | Path | None = None,
    pack: bool = False,
    resume: bool = True,
    progress: Callable[[int, int], None] | None = None,
    pages: Callable[[dict], dict[str, str]] = lambda certificate: {},
    ranks: Ranks | None = None,
) -> Report:
    """Streams the checkpoint ``source`` through ``rewrites``, in order, into a new directory ``target``.

    Both are Hugging Face directories. All arithmetic is float64, rounded once at the end to the dtype a tensor had, or
    to ``dtype`` (float64, float32, bfloat16, float16). The result is compact (it loads after ``import
    gaugekit.integrations.transformers``), or with ``dense`` in the family's plain layout, which needs no gaugekit.
    ``calibration`` is a text file for rewrites that ask for statistics. ``pack`` packs the result
    (``gaugekit.codec.pack``), for which the disk must hold it twice. Memory: one layer and 1 GB, of which half is a
    shard that fills.

    All work happens in the folder ``<target>.partial``, which is locked and marked as this job's; nothing else is
    written or removed. After a kill the same call goes on where it stopped: the same weights, text, settings and
    versions. Another one is refused, unless ``resume`` is False, which starts over. What cannot be finished (bad input)
    leaves nothing behind. ``progress(done_bytes, total_bytes)`` is called as the source is hashed, then rewritten (so
    the total is twice its size). A certificate, ``gaugekit_certificate.json``, is left in ``target``, and the text
    files that ``pages`` makes of it: {name: text} (``gaugekit.rank.page.pages`` draws the spectra of a truncation).
    ``ranks``, where every one of them makes this call, share the layers (docs/distributed.md).

    Returns a Report: parameters_before, parameters_after, bytes_before, bytes_after (weight files), steps [{rewrite,
    claim, removed {group: count, total}, ...arguments}], invariance_error (float64, the largest of any layer), seconds.

    Raises ValueError for a source that is missing, damaged, of an unknown family or already converted, an unknown dtype
    name, a target that is not empty or lies inside the source (or holds it), a ``calibration`` that is missing or that
    no rewrite asks for, or numbers that do not fit ``dtype``; OSError where the disk is too small or does not take what
    is written.
    """
    checkpoint, stored = Checkpoint(source), None if dtype is None else floating(dtype)
    if calibration is not None and not Path(calibration).is_file():
        raise ValueError(f"calibration: expected a text file, got {str(calibration)!r}, which is none")
    if calibration is not None and not (
        isinstance(rewrites, Later) or any(x.needs_statistics for x in rewrites)
    ):
        raise ValueError(NOBODY_ASKS)

    def statistics(modules: list[str], folder: Path) -> list[dict]:
        return collect(checkpoint, calibration, modules=modules, work_directory=folder)

    report = engine.run(
        Job(checkpoint, dense, stored),
        Path(target),
        rewrites,
        calibration=None if calibration is None else Calibration(sha256(Path(calibration)), statistics),
        packing=engine.Packing() if pack else None,
        resume=resume,
        progress=progress,
        pages=pages,
        ranks=ranks,
    )
    return wording.converted(report, source, target)
