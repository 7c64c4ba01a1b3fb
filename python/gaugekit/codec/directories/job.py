"""A directory packed or restored: its .safetensors files one after the other, resumed after a kill."""

from __future__ import annotations

import contextlib
import filecmp
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaugekit.codec.directories.index import INDEX_SUFFIX, check_indices, weight_map
from gaugekit.codec.files import container
from gaugekit.codec.files.container import CorruptFile
from gaugekit.codec.files.header import SUFFIX
from gaugekit.files.durable import copy, dump, identity, write
from gaugekit.files.missing import how_to_convert
from gaugekit.files.places import check_space, holds, listing, placed
from gaugekit.files.ranks import Ranks
from gaugekit.files.staging import MANIFEST, OWN, Staging, check_target, free_bytes, partial
from gaugekit.report import Report

Progress = Callable[[int, int], None] | None
START_OVER = "delete that folder, or pass resume=False, to start over"


@dataclass(frozen=True)
class Job:
    """What is done to a file, and to each .safetensors file of a directory.

    ``plan(path)`` reads and checks a file's header and says how many bytes may be written; ``work(path, place,
    advance)`` does the work and returns (bytes before, after, weights); ``same(path, place)`` says whether ``place``
    holds just what ``work`` would make of ``path`` now, CorruptFile where ``path`` is damaged. ``verify``: nothing is
    published that was not compared with its source.
    """

    verb: str
    options: dict[str, Any]
    plan: Callable[[Path], int]
    work: Callable[[Path, Path, Callable[[int], None]], tuple[int, int, int]]
    same: Callable[[Path, Path], bool]
    verify: bool = False

    @property
    def passes(self) -> int:
        """How often each byte of the source is looked at."""
        return 2 if self.verify else 1


class _Contents:
    """What a source folder holds: names of its files, of those the job is for, and of its folders."""

    def __init__(self, source: Path, target: Path):
        check_target(source, target)
        self.source = source
        self.files, self.folders = listing(source)
        for name in self.folders:
            if holds(source / name, target):
                raise ValueError(
                    f"target: expected a directory beside the source, got {str(target)!r}, which is in "
                    f"{str(source / name)!r}"
                )
        self.weights = [name for name in self.files if name.endswith(SUFFIX)]
        if not self.weights:
            raise ValueError(
                f"source: expected a directory with {SUFFIX} files, found none in {source}{how_to_convert(source)}"
            )
        self.others = sorted((name for name in self.files if not name.endswith(SUFFIX)), key=_last)
        self.bytes = {name: (source / name).stat().st_size for name in self.files}
        check_indices(source, self.files)

    def modes(self) -> dict[str, int]:
        """The permissions of the folders."""
        return {name: (self.source / name).stat().st_mode for name in (*self.folders, ".")}


def convert(
    job: Job,
    source: Path,
    target: Path,
    resume: bool,
    progress: Progress,
    started: float,
    ranks: Ranks | None = None,
) -> Report:
    """Every .safetensors file of ``source`` through the job, its index files told the new sizes, the rest copied.

    The work happens in ``<target>.partial`` (``staging.Staging``): each file there is whole and on the disk before the
    manifest names it, the other files follow, and config and index are written last. What a killed call finished is
    compared with the source as it is now, and refused where it differs. A file that was damaged leaves nothing behind;
    any other end leaves what the same call goes on from. ``ranks`` share the files; this one leads.
    """
    contents = _Contents(source, target)
    needed = sum(job.plan(source / name) for name in contents.weights)
    needed += sum(contents.bytes[name] for name in contents.others)
    check_space(target, needed, free_bytes(target))
    what = identity(job.verb, container.BUNDLED, options=job.options)
    staged = Staging(target, what, {"done": {}}, resume=resume, sound=_sound)
    with (
        staged.until_closed(CorruptFile),
        contextlib.nullcontext() if ranks is None else ranks.leading(CorruptFile),
    ):
        advance = counter(job.passes * sum(contents.bytes[name] for name in contents.weights), progress)
        _check_done(job, contents, staged, advance)
        if not staged.published:
            _fill(job, contents, staged, advance, ranks)
        elif ranks is not None:
            ranks.tell(f"{job.verb} shares", None)
        staged.publish(contents.modes())
    done = staged.state["done"]
    totals = [sum(counts[i] for counts in done.values()) for i in range(3)]
    fields = dict(zip(("bytes_before", "bytes_after", "weights"), totals, strict=True))
    report = Report(job.verb, {**fields, "seconds": time.perf_counter() - started})
    if contents.others:
        report.notes.append(f"{len(contents.others)} other files were copied as they are.")
    return report


def _check_done(job: Job, contents: _Contents, staged: Staging, advance: Callable[[int], None]) -> None:
    """ValueError where what an earlier call finished is not what the source gives now.

    That is looked at byte by byte, so that a call which nobody interrupts need not compute any digest.
    """
    for name in staged.state["done"]:
        path = contents.source / name
        if name not in contents.weights or not job.same(path, staged.folder / name):
            raise ValueError(
                f"source: {str(path)!r} does not go with {str(staged.folder / name)!r}, which was made of it: one of "
                f"them was changed or damaged since; {START_OVER}"
            )
        advance(job.passes * contents.bytes[name])
    if staged.published:
        held = {name for name in listing(staged.folder)[0] if name not in OWN}
        if held != set(contents.files) or not all(
            _copied(contents.source / name, staged.folder / name, job.verb) for name in contents.others
        ):
            raise ValueError(
                f"target: expected a new or empty directory, got {str(staged.target)!r}, made of another source"
            )


def _fill(
    job: Job, contents: _Contents, staged: Staging, advance: Callable[[int], None], ranks: Ranks | None
) -> None:
    """Makes everything that is not done yet in the folder of ``staged``."""
    source, done = contents.source, staged.state["done"]
    staged.clean(set(done))
    staged.save()
    for name in contents.folders:
        (staged.folder / name).mkdir(parents=True, exist_ok=True)
    if ranks is None:
        for name in contents.weights:
            if name not in done:
                done[name] = job.work(source / name, staged.folder / name, advance)
                staged.save()
    else:
        _share(job, contents, staged, advance, ranks)
    for name in contents.others:
        place = staged.folder / name
        text = _reindexed(source / name, place, job.verb)
        if text is None:
            copy(source / name, place)
        else:
            write(place, text)
            shutil.copymode(source / name, place)
        if job.verify and not _copied(source / name, place, job.verb):
            raise CorruptFile(f"{source / name}: its copy is not what it is: the disk or the memory erred")


def _share(
    job: Job, contents: _Contents, staged: Staging, advance: Callable[[int], None], ranks: Ranks
) -> None:
    """Every file that is not done yet, by this rank or another; the manifest names it once it is on the disk."""
    done = staged.state["done"]
    shares = ranks.shares({name: contents.bytes[name] for name in contents.weights if name not in done})
    ranks.tell(f"{job.verb} shares", {"inside": staged.folder == staged.target, "names": shares})
    waiting = {name: rank for rank, names in enumerate(shares) for name in names}

    def finished(name: str, counts: list[int]) -> None:
        del waiting[name]
        done[name] = counts
        staged.save()

    def listen(reports: list[Any]) -> None:
        for name, counts in reports:
            finished(name, counts)
            advance(job.passes * contents.bytes[name])

    def heed(size: int) -> None:
        advance(size)
        listen(ranks.news())

    for name in shares[0]:
        finished(name, list(job.work(contents.source / name, staged.folder / name, heed)))
    while waiting:
        listen(ranks.news(wait_for=waiting.values()))


def assist(job: Job, source: Path, target: Path, ranks: Ranks) -> None:
    """What ``convert`` on rank 0 leaves to this rank; returns when its files are on the disk.

    Where it leaves nothing, the folder is not looked at: rank 0 may have given it its name already.
    """
    order = ranks.hear(f"{job.verb} shares")
    if order is None or not order["names"][ranks.rank]:
        return
    folder = target if order["inside"] else partial(placed(target))
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"target: expected a disk that all ranks see, but rank 0 works in {str(folder)!r}")
    for name in order["names"][ranks.rank]:
        ranks.report([name, job.work(source / name, folder / name, lambda _: ranks.check())])


def _copied(source: Path, place: Path, verb: str) -> bool:
    """Whether ``place`` is the copy of a file that is not the job's own, or the index with the new sizes."""
    text = _reindexed(source, place, verb)
    return filecmp.cmp(source, place, shallow=False) if text is None else place.read_bytes() == text


def _last(name: str) -> tuple:
    """Index files and then config.json come last: a directory without them is seen to be unfinished."""
    return (name == "config.json", name.endswith(INDEX_SUFFIX), name)


def _sound(folder: Path, state: dict) -> bool:
    return all((folder / name).is_file() for name in state["done"])


def _reindexed(source: Path, place: Path, verb: str) -> bytes | None:
    """An index of shards with the bytes its tensors take in the new files beside ``place``; ``pack`` keeps the original
    text in it, which ``unpack`` gives again. None for what is no such index.
    """
    if not source.name.endswith(INDEX_SUFFIX):
        return None
    text = source.read_bytes()
    where = weight_map(text)
    if where is None:
        return None
    index = json.loads(text)
    metadata = index.get("metadata")
    try:
        if verb == "unpack":
            return metadata["gaugekit"].encode()
        total = sum(_stored_bytes(place.parent / file) for file in set(where.values()))
        return dump({**index, "metadata": {**metadata, "total_size": total, "gaugekit": text.decode()}})
    except (LookupError, TypeError, AttributeError, UnicodeError, RecursionError):
        return None


def _stored_bytes(path: Path) -> int:
    """The bytes of a packed shard's tensors; of a shard of another format, all its bytes."""
    if not path.name.endswith(SUFFIX):
        return path.stat().st_size
    with path.open("rb") as file:
        return container.read(file).stored.data_bytes


def counter(total: int, progress: Progress) -> Callable[[int], None]:
    """Adds up what it is told and passes it on as ``progress(done, total)``."""
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress and size:
            progress(min(done, total), total)

    return advance
