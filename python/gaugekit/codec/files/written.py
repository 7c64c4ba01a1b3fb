"""A single file written beside its place: it has its name when it is whole, and nothing is left of it otherwise."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gaugekit.codec.directories.job import check_space
from gaugekit.files import staging
from gaugekit.files.places import beside, naming_file


def check_room(target: Path, needed: int) -> None:
    """OSError unless the disk of ``target``, whose folder may not be there yet, has ``needed`` bytes left."""
    folder = next(folder for folder in target.parents if folder.is_dir())
    check_space(target, needed, shutil.disk_usage(folder).free)


@contextmanager
def written(target: Path, like: Path | None = None) -> Iterator[BinaryIO]:
    """A hidden sibling that becomes ``target`` when all was written and reached the disk, and is removed otherwise;
    what a killed process left of one is written over. ``like`` is the file whose permissions it takes, last of all.

    ValueError where another process is writing it, or what has the sibling's name is none of ours.
    """
    path = beside(target, ".", ".gaugekit-partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming_file(target), _opened(path, like) as file:
        held = staging.lock(file) and path.exists()
        # A process that had the lock may have given the file its name meanwhile: then it is not ours, either.
        if not held or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise ValueError(f"target: another process is writing {str(path)!r}")
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if like is not None:
                shutil.copymode(like, path)
            os.replace(path, target)
            staging.sync(target.parent)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _opened(path: Path, like: Path | None) -> BinaryIO:
    """The sibling, new or as a killed process left it: a plain file with no other name, and not the source itself."""
    taken = ValueError(f"target: expected {str(path)!r} to be free for the work in progress; it is taken")
    if os.path.lexists(path):
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise taken
        if like is not None and os.path.samestat(status, like.stat()):
            raise taken
    flags = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return open(path, "r+b", opener=lambda name, given: os.open(name, given | flags, 0o666))
