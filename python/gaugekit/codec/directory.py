"""A directory packed or restored: its .safetensors files one after the other, resumed after a kill."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from ..report import Report
from ..staging import Staging, check_target, copy, dump, free_bytes, write
from . import container
from .container import SUFFIX, CorruptFile

INDEX_SUFFIX = SUFFIX + ".index.json"
Progress = Callable[[int, int], None] | None


def convert(
    job: dict,
    plan: Callable[[Path], int],
    one: Callable[[Path, Path, Callable[[int], None]], tuple[int, int, int]],
    source: Path,
    target: Path,
    resume: bool,
    passes: int,
    progress: Progress,
    started: float,
) -> Report:
    """Every .safetensors file of ``source`` through ``one``, its index files told the new sizes, the rest copied.

    The work happens in ``<target>.partial`` (``staging.Staging``): each file there is whole and on the disk before the
    manifest names it, the other files follow, and config and index are written last. A file that was damaged leaves
    nothing behind; any other end leaves what the same call goes on from.
    """
    check_target(source, target)
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    weights = [name for name in names if name.endswith(SUFFIX)]
    if not weights:
        raise ValueError(f"source: expected a directory with {SUFFIX} files, found none in {source}")
    stats = {name: (source / name).stat() for name in names}
    needed = sum(plan(source / name) for name in weights)
    needed += sum(stats[name].st_size for name in names if name not in weights)
    target.parent.mkdir(parents=True, exist_ok=True)
    check_space(target, needed, free_bytes(target))
    identity = {**job, "files": [[name, stats[name].st_size, stats[name].st_mtime_ns] for name in weights]}
    staged = Staging(target, identity, {"done": {}}, resume=resume, sound=_sound)
    try:
        done = staged.state["done"]
        advance = counter(passes * sum(stats[name].st_size for name in weights), progress)
        if not staged.published:
            staged.clean(set(done))
            staged.save()
            for name in weights:
                if name in done:
                    advance(passes * stats[name].st_size)
                    continue
                place = staged.folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                done[name] = one(source / name, place, advance)
                staged.save()
            others = [name for name in names if name not in weights]
            for name in sorted(others, key=_last):
                if name.endswith(INDEX_SUFFIX):
                    _reindex(source / name, staged.folder / name, job["verb"])
                else:
                    copy(source / name, staged.folder / name)
            staged.folder.chmod(source.stat().st_mode)
        staged.publish()
    except CorruptFile:
        staged.discard()
        raise
    finally:
        staged.close()
    totals = [sum(counts[i] for counts in done.values()) for i in range(3)]
    fields = dict(zip(("bytes_before", "bytes_after", "weights"), totals, strict=True))
    report = Report(job["verb"], {**fields, "seconds": time.perf_counter() - started})
    if copied := len(names) - len(weights):
        report.notes.append(f"{copied} other files were copied as they are.")
    return report


def _last(name: str) -> tuple:
    """Index files and then config.json come last: a directory without them is seen to be unfinished."""
    return (name == "config.json", name.endswith(INDEX_SUFFIX), name)


def _sound(folder: Path, state: dict) -> bool:
    return all((folder / name).is_file() for name in state["done"])


def _reindex(source: Path, target: Path, verb: str) -> None:
    """An index of shards with the bytes its tensors take in the new files; ``pack`` keeps the original text in it,
    which ``unpack`` writes again. What is no such index is copied.
    """
    text = source.read_bytes()
    try:
        index = json.loads(text)
        metadata, where = index["metadata"], index["weight_map"]
        if verb == "unpack":
            write(target, metadata["gaugekit"].encode())
            return
        files = {target.with_name(name) for name in where.values()}
        total = 0
        for path in files:
            with path.open("rb") as file:
                total += container.read(file).stored.data_bytes
        write(
            target, dump({**index, "metadata": {**metadata, "total_size": total, "gaugekit": text.decode()}})
        )
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        copy(source, target)


def check_space(target: Path, needed: int, free: int) -> None:
    """OSError unless ``needed`` bytes are free beside ``target``."""
    if free < needed:
        message = f"{needed:,} bytes are needed beside {target.name}, {free:,} are free"
        raise OSError(errno.ENOSPC, message, os.fspath(target.parent))


def counter(total: int, progress: Progress) -> Callable[[int], None]:
    """Adds up what it is told and passes it on as ``progress(done, total)``."""
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress and size:
            progress(min(done, total), total)

    return advance
