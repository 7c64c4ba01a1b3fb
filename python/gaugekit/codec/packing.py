"""pack and unpack: .safetensors files and directories of them, never over the input."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from gaugekit.codec.directories.job import Job, Progress, assist, convert, counter
from gaugekit.codec.files import container, stream
from gaugekit.codec.files.container import CorruptFile, Packed, naming
from gaugekit.codec.files.header import SUFFIX, Entry
from gaugekit.codec.files.stream import MEMORY_BYTES, Crew
from gaugekit.codec.tensors.buffers import Room
from gaugekit.codec.tensors.pieces import read_at
from gaugekit.files.durable import hurry, written
from gaugekit.files.missing import how_to_get
from gaugekit.files.places import check_place, check_space, placed
from gaugekit.files.ranks import Ranks
from gaugekit.report import Report, change, shell, size


def pack(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    symbols: str | None = None,
    verify: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    resume: bool = True,
    progress: Progress = None,
    ranks: Ranks | None = None,
) -> Report:
    """Packs the .safetensors file ``source`` into ``target``, or every one in a directory, the rest being copied.

    Tensors of a dtype that ``encode`` takes are coded where that makes them smaller, everything else is stored as it
    is; ``symbols`` are those of ``encode`` for the bfloat16 ones ("exponent-and-mantissa": smaller, slower). ``unpack``
    restores each file byte for byte. A packed file is a valid .safetensors file (docs/format.md), and a packed model
    directory loads once ``gaugekit.integrations.transformers`` is imported. With ``verify`` each packed file is
    restored again in memory and compared with the source before it is given its name, and every copy too. No file
    grows by more than 1 % and 4 KB.

    Memory: ``memory_bytes`` of buffers (64 MiB or more), whatever the tensors' sizes. Nothing is written over the
    input. A file is written beside its place, flushed and renamed. A directory grows in ``<target>.partial``; after a
    kill the same call goes on behind the last whole file, unless ``resume`` is False: what was finished is compared
    with the source as it is now, and refused where it differs. Links in the source are followed, empty folders kept.
    ``progress(done, total)`` counts the source's bytes, twice with ``verify``. ``ranks``, where every one of them makes
    this call, share the files of a directory (docs/distributed.md): the same bytes, from several machines.

    Report: bytes_before, bytes_after and ratio of the .safetensors files, bits_per_weight over them (headers included),
    verified, seconds. ValueError for a source that is missing, packed already, holds no .safetensors, something that
    cannot be copied (a link to nothing, a socket), or an index that promises what is not there; for a target that is a
    link, a device, or in a folder that cannot be written in; and for unfinished work of another source or ``symbols``.
    CorruptFile for a source that is damaged, OSError when the disk is too small or fails.
    """
    stream.check_symbols(symbols)
    with Crew(memory_bytes) as crew:
        pack_file = partial(_pack_file, crew=crew, symbols=symbols, verify=verify)
        same = partial(_is_packed, crew=crew)
        job = Job("pack", {"symbols": symbols}, _packable, pack_file, same, verify)
        report = _run(job, source, target, resume, progress, ranks)
    weights, after = report.fields.pop("weights"), report["bytes_after"]
    report.fields["ratio"] = after / report["bytes_before"]
    report.fields["bits_per_weight"] = 8 * after / weights if weights else 0.0
    report.fields["verified"] = verify
    report.fields["seconds"] = report.fields.pop("seconds")
    compared = "; each file was decoded again and compared" if verify else ""
    report.lines.insert(1, ("bits a weight", f"{report['bits_per_weight']:.2f}, headers included"))
    report.done = f"Packed {source} without loss and wrote {target}{compared}."
    report.next = (
        f"gaugekit unpack {shell(target)} RESTORED brings every byte back; transformers loads it as it is"
    )
    return report


def unpack(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    memory_bytes: int = MEMORY_BYTES,
    resume: bool = True,
    progress: Progress = None,
    ranks: Ranks | None = None,
) -> Report:
    """Restores what ``pack`` was given, byte for byte: a file, or a directory of files.

    Every checksum is verified; damage raises CorruptFile and leaves no output behind. Memory, resuming, progress and
    ranks as for ``pack``. ValueError for an ordinary .safetensors file. Report: bytes_before, bytes_after (of the
    .safetensors files), seconds.
    """
    with Crew(memory_bytes) as crew:
        unpack_file, same = partial(_unpack_file, crew=crew), partial(_is_unpacked, crew=crew)
        job = Job("unpack", {}, _unpackable, unpack_file, same)
        report = _run(job, source, target, resume, progress, ranks)
    del report.fields["weights"]
    report.done = f"Restored {target} from {source}, byte for byte."
    report.next = f"use {target} as any .safetensors"
    return report


def _run(job: Job, source, target, resume: bool, progress: Progress, ranks: Ranks | None) -> Report:
    """One file or a directory; of several ranks, each returns once the target stands."""
    if ranks is None:
        return _told(_lead(job, source, target, resume, progress, None))
    if ranks.leads:
        report = _lead(job, source, target, resume, progress, ranks)
        ranks.tell(f"{job.verb} report", [report.fields, report.notes])
    else:
        assist(job, Path(os.path.realpath(source)), placed(Path(target)), ranks)
        fields, notes = ranks.hear(f"{job.verb} report")
        report = Report(job.verb, fields, notes=notes)
    return _told(report)


def _lead(job: Job, source, target, resume: bool, progress: Progress, ranks: Ranks | None) -> Report:
    started = time.perf_counter()
    source, slash, target = Path(source), os.fspath(target).endswith(("/", os.sep)), Path(target)
    if not source.exists():
        raise ValueError(
            f"source: expected a {SUFFIX} file or a directory, but {source} does not exist{how_to_get(source)}"
        )
    if not (source.is_file() or source.is_dir()):
        raise ValueError(f"source: expected a {SUFFIX} file or a directory, but {source} is neither")
    whole, place = Path(os.path.realpath(source)), placed(target)
    check_place(target)
    if place == whole or (place.exists() and whole.samefile(place)):
        raise ValueError(f"target: expected another path than source, got {target} for both")
    if whole.is_dir():
        return convert(job, whole, place, resume, progress, started, ranks)
    if slash or place.is_dir():
        raise ValueError(f"target: expected a file name, got the directory {target}")
    check_space(place, job.plan(whole))
    if ranks is not None:
        ranks.tell(f"{job.verb} shares", None)  # a file is one piece of work
    counts = job.work(whole, place, counter(job.passes * whole.stat().st_size, progress))
    fields = dict(zip(("bytes_before", "bytes_after", "weights"), counts, strict=True))
    return Report(job.verb, {**fields, "seconds": time.perf_counter() - started})


def _told(report: Report) -> Report:
    sizes = report["bytes_before"], report["bytes_after"]
    report.lines = [
        (".safetensors", f"{size(sizes[0])} before, {size(sizes[1])} after: {change(*sizes)}"),
        ("time", f"{report['seconds']:.1f} s"),
    ]
    return report


def _packable(path: Path) -> int:
    with path.open("rb") as file, naming(path):
        opened = container.read(file)
    if isinstance(opened, Packed):
        raise ValueError(f"source: expected an ordinary {SUFFIX} file, but {path} is packed already")
    return stream.most_bytes(opened)


def _unpackable(path: Path) -> int:
    return _packed(path).original.file_bytes


def _packed(path: Path) -> Packed:
    with path.open("rb") as file, naming(path):
        header = container.read(file)
    if not isinstance(header, Packed):
        raise ValueError(f"source: expected a packed file, but {path} is an ordinary {SUFFIX} file")
    return header


def _pack_file(
    source: Path, target: Path, advance: Callable, *, crew: Crew, symbols: str | None, verify: bool
) -> tuple[int, int, int]:
    with source.open("rb") as file, naming(source), written(target, like=source) as out:
        original = container.read(file)

        def read(entry: Entry, start: int, stop: int, room: Room):
            place = original.data_start + entry.begin + start
            return read_at(file, place, stop - start, room(stop - start))

        advance(original.data_start)
        after = stream.pack(original, read, out, crew, symbols, advance)
        out.flush()
        if verify:
            _verify(file, out, crew)
            advance(original.file_bytes)
    return original.file_bytes, after, sum(entry.weights for entry in original.entries)


def _verify(source: BinaryIO, packed: BinaryIO, crew: Crew) -> None:
    """CorruptFile unless what was written to ``packed`` restores ``source``: nothing is published then."""
    with open(packed.name, "rb") as file:
        try:
            restores = stream.restores(file, source, crew)
        except CorruptFile:
            restores = False
    if not restores:
        raise CorruptFile("what was written does not restore it: the disk, the memory or the processor erred")


def _is_packed(source: Path, place: Path, *, crew: Crew) -> bool:
    """Whether ``place`` is a sound packed file of ``source``."""
    with source.open("rb") as file, place.open("rb") as packed:
        try:
            return stream.restores(packed, file, crew)
        except CorruptFile:
            return False


def _is_unpacked(source: Path, place: Path, *, crew: Crew) -> bool:
    """Whether ``place`` is what the packed file ``source`` restores."""
    with source.open("rb") as packed, place.open("rb") as file, naming(source):
        return stream.restores(packed, file, crew)


def _unpack_file(source: Path, target: Path, advance: Callable, *, crew: Crew) -> tuple[int, int, int]:
    with source.open("rb") as file, naming(source), written(target, like=source) as out:
        packed = container.read(file)
        advance(packed.stored.data_start)
        for piece in stream.restored(file, packed, crew, advance):
            out.write(piece)
            hurry(out)
    weights = sum(entry.weights for entry in packed.original.entries)
    return packed.file_bytes, packed.original.file_bytes, weights
