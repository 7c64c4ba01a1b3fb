"""The engine: streams a checkpoint through rewrites into one locked place of work, and publishes the result whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gaugekit import codec
from gaugekit.checkpoint.config import CONFIG
from gaugekit.checkpoint.dtypes import name_of
from gaugekit.checkpoint.reader import INDEX, Checkpoint
from gaugekit.checkpoint.version import VERSION
from gaugekit.checkpoint.writer import CERTIFICATE, SCRATCH, VERIFICATION, Writer, versions
from gaugekit.files.durable import identity
from gaugekit.files.places import listing
from gaugekit.files.ranks import Ranks
from gaugekit.files.staging import MANIFEST, OWN, Staging, check_target, free_bytes
from gaugekit.report import Report
from gaugekit.rewrite import sharing
from gaugekit.rewrite.job import Job
from gaugekit.rewrite.rewrite import Calibration, Later, Step

OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf"}
UNPACKED, PACKED = "unpacked", "packed"  # in the scratch of a conversion that packs
Pages = Callable[[dict], dict[str, str]]


@dataclass(frozen=True)
class Packing:
    """``pack(source, target)`` makes a packed directory of a plain one; ``name`` is what a report calls it. ``shared``:
    it takes ``ranks``, too.
    """

    name: str = "pack"
    pack: Callable[..., Report] = field(default_factory=lambda: codec.pack)
    shared: bool = True

    def run(self, folder: Path, ranks: Ranks | None) -> Report:
        """Packs what stands in the scratch ``folder`` of a conversion."""
        options = {"ranks": ranks} if self.shared and ranks is not None else {}
        return self.pack(folder / UNPACKED, folder / PACKED, **options)


def run(
    job: Job,
    target: Path,
    rewrites: Sequence[Step] | Later,
    *,
    calibration: Calibration | None,
    packing: Packing | None,
    resume: bool,
    progress: Callable[[int, int], None] | None,
    pages: Pages,
    ranks: Ranks | None = None,
) -> Report:
    """``gaugekit.convert``, the statistics that rewrites ask for taken from ``calibration``.

    ``job`` says what the units of the work are, and what is done to each. ``packing`` packs the result, if it is to be
    packed. ``ranks`` share the layers; rank 0 does all else.
    """
    if ranks is not None and not ranks.leads:
        pack = (lambda folder: packing.run(folder, ranks)) if packing and packing.shared else None
        return sharing.assist(job, target, rewrites, calibration, pack, ranks)
    start = time.perf_counter()
    work = _Conversion(job, target, calibration, packing, progress, ranks)
    check_target(job.checkpoint.path, target)
    if not isinstance(rewrites, Later):
        work.take(rewrites)
        if shortage := work.shortage():
            raise ValueError(shortage)
    staged = Staging(
        target,
        work.identity(rewrites),
        work.start(),
        resume=resume,
        sound=work.sound if packing else Writer.sound,
    )
    with (
        staged.until_closed(ValueError),
        contextlib.nullcontext() if ranks is None else ranks.leading(ValueError),
    ):
        if not staged.published:
            work.run(staged, rewrites, pages)
        for name in {"work", "packing"} - work.offered if ranks is not None else ():
            ranks.tell(name, None)
        fields = staged.state["report"]
        staged.publish()
    work.advance(work.total_bytes)  # the files' headers count too
    fields["seconds"] += time.perf_counter() - start
    if ranks is not None:
        ranks.tell("convert report", [fields, work.notes])
    return Report("convert", fields, work.notes)


class _Conversion:
    """One call of ``convert``: what it reads, what is asked of it, how far it is."""

    def __init__(
        self, job: Job, target: Path, calibration, packing: Packing | None, progress, ranks: Ranks | None
    ):
        checkpoint = job.checkpoint
        self.checkpoint, self.target, self.job = checkpoint, target, job
        self.ranks, self.offered = ranks, set()  # what the other ranks were given to do
        self.calibration, self.packing, self.progress = calibration, packing, progress
        self.copies, self.notes = _copies(checkpoint)
        self.total_bytes, self.done_bytes = 2 * checkpoint.size_bytes(), 0
        self.steps: list[dict[str, Any]] = []

    def take(self, rewrites: Sequence[Step]) -> None:
        """Makes these the job's rewrites; ValueError where they do not fit the model or lack a text."""
        self.job.rewrites = list(rewrites)
        self.steps = self.job.steps()
        asking = ", ".join(rewrite.name for rewrite in rewrites if rewrite.needs_statistics)
        if asking and self.calibration is None:
            raise ValueError(f"calibration: expected a text file ({asking} asks for statistics), got None")

    def shortage(self) -> str | None:
        """What the disk lacks for the result, in words; what an earlier run of the job holds counts as free."""
        removed = sum(step["removed"]["total"] for step in self.steps)
        weights = self.job.result_bytes(removed) + (1 << 20)
        others = sum(path.stat().st_size for path in self.copies.values())
        needed = (2 if self.packing else 1) * (weights + others)
        free = free_bytes(self.target)
        if free >= needed:
            return None
        return f"target: expected {needed:,} bytes free in {str(self.target.parent)!r}, got {free:,}"

    def identity(self, rewrites: Sequence[Step] | Later) -> dict:
        weights: dict[str, Any] = {"source": self.checkpoint.sha256(self.advance)}
        text = {} if self.calibration is None else {"calibration": self.calibration.digest}
        if isinstance(rewrites, Later):
            asked: Any = rewrites.arguments
        else:
            asked = self.steps
            weights |= {f"rewrite {number}": rewrite.digests for number, rewrite in enumerate(rewrites)}
        options = {
            "rewrites": asked,
            "dense": self.job.dense,
            "dtype": str(self.job.dtype),
            "pack": self.packing and self.packing.name,
        }
        version = {"format": VERSION, **versions()}
        return identity("convert", version, weights=weights, text=text, options=options)

    def start(self) -> dict[str, Any]:
        return {**Writer.start(), "packed": None, "report": None}

    @staticmethod
    def sound(folder: Path, state: dict) -> bool:
        """Of a conversion that packs: its shards stand in the scratch until they are packed."""
        return state["packed"] is not None or Writer.sound(_unpacked(folder), state)

    def advance(self, size: int) -> None:
        self.done_bytes += size
        if self.progress:
            self.progress(min(self.done_bytes, self.total_bytes), self.total_bytes)

    def run(self, staged: Staging, rewrites: Sequence[Step] | Later, pages: Pages) -> None:
        """Everything up to a folder that is whole, and what there is to report of it."""
        if not staged.resumed:
            staged.clean(set())
            staged.save()
        scratch = staged.folder / SCRATCH
        if staged.state["report"] is None:
            if isinstance(rewrites, Later):
                scratch.mkdir(exist_ok=True)
                with self._first("rewrites"):
                    self.take(rewrites.find(scratch / "rewrites"))
                if shortage := self.shortage():
                    raise OSError(errno.ENOSPC, shortage)  # what was found is kept for when there is room
            folder = _unpacked(staged.folder) if self.packing else staged.folder
            fields = self._write(Writer(staged, folder), staged, pages)
            fields["bytes_after"] = Checkpoint(folder).size_bytes()
            staged.state["report"] = fields
            staged.save()
        if self.packing:
            self._pack(staged, self.packing)
        shutil.rmtree(scratch, ignore_errors=True)

    def _first(self, name: str) -> contextlib.AbstractContextManager:
        """Around what each rank reads in its turn, and rank 0 makes."""
        return contextlib.nullcontext() if self.ranks is None else self.ranks.in_turn(name)

    def _results(self, staged: Staging, done: int) -> Iterator[sharing.Result]:
        """What the units from ``done`` on become."""
        job, folder = self.job, staged.folder / SCRATCH
        if done == len(job.units):
            return
        if self.ranks is not None:
            self.offered.add("work")
            others = sharing.offer(staged, done, self.ranks)
        with self._first("statistics"):
            statistics = job.statistics(self.calibration, folder / "statistics")
        if self.ranks is not None:
            yield from sharing.results(job, done, statistics, others, self.ranks)
        else:
            yield from (job.run(unit, statistics) for unit in job.units[done:])

    def _write(self, writer: Writer, staged: Staging, pages: Pages) -> dict[str, Any]:
        job, checkpoint = self.job, self.checkpoint
        done = writer.done
        results = self._results(staged, done)
        for number, unit in enumerate(job.units):
            if number >= done:
                writer.add(*next(results))
            self.advance(sum(checkpoint.bytes(name) for name in unit.names))
        records = writer.records
        fields = {
            "parameters_before": sum(record["before"] for record in records),
            "parameters_after": sum(record["after"] for record in records),
            "bytes_before": checkpoint.size_bytes(),
            "steps": self.steps,
            "invariance_error": _largest(record.get("invariance_error", 0.0) for record in records),
            "seconds": 0.0,
        }
        fields["steps"] = [*self.steps, *_beyond_the_plan(fields, job.dense)]

        def certificate(output: dict[str, str]) -> dict:
            return {
                **{name: value for name, value in fields.items() if name != "seconds"},
                "layers": [
                    {"layer": r["layer"], "invariance_error": r["invariance_error"], **r["notes"]}
                    for r in records
                    if "layer" in r
                ],
                "dense": job.dense,
                "dtype": None if job.dtype is None else name_of(job.dtype),
                "source_sha256": checkpoint.sha256(),
                "output_sha256": output,
                "versions": {**versions(), "format": VERSION},
            }

        writer.finish(job.config(records), certificate, self.copies, pages)
        return fields

    def _pack(self, staged: Staging, packing: Packing) -> None:
        """Packs the result, and moves what that gives into its place; each step can be gone on from."""
        packed = staged.folder / SCRATCH / PACKED
        fields = staged.state["report"]
        if staged.state["packed"] is None:
            if packed.is_dir() and not (packed / MANIFEST).is_file():
                shutil.rmtree(packed)  # whole, but a kill lost its report
            if self.ranks is not None and packing.shared:
                self.offered.add("packing")
                self.ranks.tell("packing", {"inside": staged.folder == staged.target})
            report = packing.run(staged.folder / SCRATCH, self.ranks)
            staged.state["packed"] = report.fields
            fields["bytes_after"] = report["bytes_after"]
            told = ("bytes_before", "bytes_after", "ratio", "verified", "seconds")
            step = {
                "rewrite": packing.name,
                "claim": "exact",
                **{k: v for k, v in report.fields.items() if k not in told},
            }
            fields["steps"] = [*fields["steps"], step]
            staged.save()
        if packed.is_dir():
            for path in sorted(packed.iterdir()):
                _move(path, staged.folder)


def _beyond_the_plan(fields: dict[str, Any], dense: bool) -> list[dict[str, Any]]:
    """A step for the numbers that went although no plan could see them in the config: query and key channels that an
    earlier truncation had left at zero.
    """
    planned = sum(step["removed"]["total"] for step in fields["steps"])
    more = fields["parameters_before"] - fields["parameters_after"] - planned
    if dense or not fields["steps"] or more <= 0:
        return []
    removed = {"idle_channels": more, "total": more}
    return [{"rewrite": "idle channels", "claim": "exact", "removed": removed}]


def _largest(errors: Iterable[float | None]) -> float | None:
    """The largest error of any layer; None where a job computes none."""
    errors = list(errors)
    return None if None in errors else max(errors, default=0.0)


def _unpacked(folder: Path) -> Path:
    """Where the result of a conversion stands until it is packed."""
    return folder / SCRATCH / UNPACKED


def _move(path: Path, folder: Path) -> None:
    os.rename(path, folder / path.name)


def _copies(checkpoint: Checkpoint) -> tuple[dict[str, Path], list[str]]:
    """The files to copy as they are, by relative name, and a note of every other that stays behind."""
    copies, notes = {}, []
    ours = {CONFIG, INDEX, CERTIFICATE, VERIFICATION, *OWN, *checkpoint.files}
    for name in listing(checkpoint.path)[0]:
        path = Path(name)
        if name in ours or path.parts[0] == SCRATCH:
            continue
        if any(part.startswith(".") for part in path.parts):
            notes.append(f"not copied: {name} (hidden)")
        elif path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json"):
            notes.append(f"not copied: {name} (other weights)")
        else:
            copies[name] = checkpoint.path / name
    return copies, notes
