"""The units of a conversion shared among ranks: layers computed apart, and put together by rank 0 in their order."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gaugekit.checkpoint.writer import SCRATCH, safetensors_package, save_tensors
from gaugekit.files.places import placed
from gaugekit.files.ranks import Ranks
from gaugekit.files.staging import MANIFEST, Staging, partial
from gaugekit.report import Report
from gaugekit.rewrite.job import Job
from gaugekit.rewrite.rewrite import Calibration, Later, Step

AHEAD = 4  # layers that a rank may have on the disk which rank 0 has not taken yet

Result = tuple[dict[str, Tensor], dict[str, Any]]


def offer(staged: Staging, done: int, ranks: Ranks) -> Path:
    """Tells the other ranks that the work behind the first ``done`` units can begin; where their results will be."""
    folder = staged.folder / SCRATCH / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ranks.tell("work", {"inside": staged.folder == staged.target, "done": done})
    return folder


def results(
    job: Job, done: int, statistics: Sequence[dict] | None, folder: Path, ranks: Ranks
) -> Iterator[Result]:
    """What ``job.run`` gives for each unit from ``done`` on: of some layers, as other ranks leave it in ``folder``."""
    workers = _workers(job, done, ranks.size)
    for number, unit in enumerate(job.units[done:], done):
        if (worker := workers.get(number, 0)) == 0:
            yield job.run(unit, statistics)
            continue
        told, path = ranks.hear(f"unit {number}", worker), folder / f"{number}.safetensors"
        tensors = safetensors_package().torch.load_file(path)
        yield {name: tensors[name] for name in told["names"]}, told["record"]
        path.unlink()
        ranks.tell(f"taken {number}", True)


def assist(
    job: Job,
    target: Path,
    rewrites: Sequence[Step] | Later,
    calibration: Calibration | None,
    pack: Callable[[Path], object] | None,
    ranks: Ranks,
) -> Report:
    """What ``engine.run`` on rank 0 leaves to this rank; its Report, once the target stands.

    What rank 0 found out of text stands in its folder, where this rank reads it in its turn; a rank that gets no layer
    looks at no file, which rank 0 need not wait for it to do. ``pack(folder)`` is this rank's part in the packing of
    what stands in the scratch ``folder``, where the ranks share that.
    """
    order = ranks.hear("work")
    if order is not None:
        workers, folder = _workers(job, order["done"], ranks.size), _folder(target, order)
        mine = [number for number, rank in workers.items() if rank == ranks.rank]
        if mine and not (folder / MANIFEST).is_file():
            raise ValueError(
                f"target: expected a disk that all ranks see, but rank 0 works in {str(folder)!r}"
            )
        if isinstance(rewrites, Later):
            with ranks.in_turn("rewrites"):
                rewrites = rewrites.find(folder / SCRATCH / "rewrites") if mine else []
        job.rewrites = list(rewrites)
        with ranks.in_turn("statistics"):
            statistics = job.statistics(calibration, folder / SCRATCH / "statistics") if mine else None
        _compute(job, mine, statistics, folder / SCRATCH / "ranks", ranks)
    if pack is not None and (order := ranks.hear("packing")) is not None:
        pack(_folder(target, order) / SCRATCH)
    fields, notes = ranks.hear("convert report")
    return Report("convert", fields, notes)


def _folder(target: Path, order: dict[str, Any]) -> Path:
    """Where rank 0 works."""
    return target if order["inside"] else partial(placed(target))


def _compute(
    job: Job, mine: Sequence[int], statistics: Sequence[dict] | None, folder: Path, ranks: Ranks
) -> None:
    """The units ``mine`` into ``folder``, a few ahead of rank 0."""
    for place, number in enumerate(mine):
        if place >= AHEAD:
            ranks.hear(f"taken {mine[place - AHEAD]}")
        ranks.check()
        tensors, record = job.run(job.units[number], statistics)
        save_tensors(tensors, folder / f"{number}.safetensors")
        ranks.tell(f"unit {number}", {"names": list(tensors), "record": record})


def _workers(job: Job, done: int, size: int) -> dict[int, int]:
    """{unit: rank} of the layers; what is only copied is left to rank 0, which writes it."""
    layers = [number for number, unit in enumerate(job.units) if unit.layer is not None and number >= done]
    return {number: place % size for place, number in enumerate(layers)}
