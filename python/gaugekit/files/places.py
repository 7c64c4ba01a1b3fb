"""Where a result may be put, and what a source folder holds: what can go wrong there is said before any work."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

NAME_BYTES = 255  # of a file's name on common file systems; one that takes fewer refuses the target itself


def placed(target: Path) -> Path:
    """``target`` as an absolute path: links among its folders are followed, its own name is kept as it is."""
    if target.name in ("", ".", ".."):
        return Path(os.path.realpath(target))
    return Path(os.path.realpath(target.parent), target.name)


def beside(target: Path, prefix: str, suffix: str) -> Path:
    """A neighbour of ``target``, its name between ``prefix`` and ``suffix``, or the beginning of it and a digest where
    the whole would be too long for a file system.
    """
    target = placed(target)
    name = os.fsencode(target.name)
    room = NAME_BYTES - len(os.fsencode(prefix + suffix))
    if len(name) <= room:
        return target.with_name(prefix + target.name + suffix)
    digest = hashlib.sha256(name).hexdigest()[:16]
    start = name[: room - 17].decode(errors="ignore")
    return target.with_name(f"{prefix}{start}-{digest}{suffix}")


def check_place(target: Path) -> None:
    """ValueError where nothing new may be put under the name ``target``: it is a link, a device or the like, or its
    folder is none, or cannot be written in.
    """
    try:
        mode = os.lstat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:
        raise ValueError(f"target: {error.strerror}: {str(target)!r}") from None
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "neither file nor folder"
        raise ValueError(
            f"target: expected a new name, a file or a folder, got {str(target)!r}, which is {kind}"
        )
    parent = next(parent for parent in placed(target).parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise ValueError(f"target: expected {str(target)!r} to be in a folder, but {str(parent)!r} is none")
    inside = mode is not None and stat.S_ISDIR(mode) and os.access(target, os.W_OK | os.X_OK)
    if not inside and not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"target: expected a folder that can be written in, got {str(parent)!r}, which cannot"
        )


def check_space(target: Path, needed: int, free: int | None = None) -> None:
    """OSError unless ``needed`` bytes are free beside ``target``, whose folder may not be there yet; ``free`` are,
    where the caller knows.
    """
    if free is None:
        free = shutil.disk_usage(next(folder for folder in target.parents if folder.is_dir())).free
    if free < needed:
        message = f"{needed:,} bytes are needed beside {target.name}, {free:,} are free"
        raise OSError(errno.ENOSPC, message, os.fspath(placed(target).parent))


def holds(folder: Path, place: Path) -> bool:
    """Whether ``place`` is ``folder`` or in it, by whatever path."""
    real = Path(os.path.realpath(place))
    return any(
        other == Path(os.path.realpath(folder))
        or (folder.exists() and other.exists() and folder.samefile(other))
        for other in (real, *real.parents)
    )


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """The names, relative to ``folder``, of all files in it and of all folders, both sorted; links are followed.

    ValueError naming what cannot be copied: a link to nothing or back to a folder it is in, what is neither file nor
    folder, and what may not be read. OSError as the system raises it.
    """
    files, folders = [], []
    waiting: list[tuple[str, frozenset]] = [("", frozenset())]
    while waiting:
        name, above = waiting.pop()
        path = folder / name
        status = os.stat(path)
        key = (status.st_dev, status.st_ino)
        if key in above:
            raise ValueError(f"source: {str(path)!r} is a link back to a folder that it is in")
        if not os.access(path, os.R_OK | os.X_OK):
            raise ValueError(f"source: the folder {str(path)!r} cannot be read")
        for child in os.listdir(path):
            inner = os.path.join(name, child)
            kind = _kind(folder / inner)
            if kind == "folder":
                folders.append(inner)
                waiting.append((inner, above | {key}))
            else:
                files.append(inner)
    return sorted(files), sorted(folders)


def _kind(path: Path) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        what = "is a link to nothing that can be read" if path.is_symlink() else "cannot be read"
        raise ValueError(f"source: {str(path)!r} {what}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise ValueError(f"source: {str(path)!r} is neither a file nor a folder")
    if not os.access(path, os.R_OK):
        raise ValueError(f"source: {str(path)!r} cannot be read")
    return "file"


@contextlib.contextmanager
def naming_file(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the system that name no file name ``path``: those of reads and writes of an open one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
