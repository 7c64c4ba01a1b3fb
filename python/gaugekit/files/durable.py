"""Files that are whole or not there at all, on the disk before anything speaks of them; and what says that two jobs are
the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

from gaugekit.files.places import beside, naming_file

SYNC_FILE_RANGE_WRITE = 2  # of Linux


def identity(
    verb: str,
    version: Any,
    *,
    weights: Mapping[str, str | Mapping[str, str]] | None = None,
    text: Mapping[str, Any] | None = None,
    options: dict[str, Any],
) -> dict:
    """What makes two calls the same job, so that the second may go on with what a kill left of the first.

    ``version`` is that of what the job writes. ``weights`` are SHA-256 of the numbers that are read, by their role
    ("source", "student"), or several of a role by name. ``text`` are strings or token ids by their role, of which the
    digest is taken here. ``options`` is everything else that the result depends on. No names, sizes or times of files:
    equal ones say nothing about what is in them. All values are JSON.
    """
    digests = {}
    for role, given in (weights or {}).items():
        digests |= (
            {role: given} if isinstance(given, str) else {f"{role} {name}": d for name, d in given.items()}
        )
    digests |= {role: digest_of(value) for role, value in (text or {}).items()}
    parts = {"verb": verb, "version": version, "digests": digests, "options": options}
    return json.loads(json.dumps(parts))  # as the manifest gives it back: tuples are lists there


def digest_of(value: Any) -> str:
    """The SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal; ``progress`` is told each block's bytes."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
        if progress:
            progress(len(block))
    return digest.hexdigest()


def dump(content: dict) -> bytes:
    """JSON as our files have it; names that are no Unicode text are escaped."""
    try:
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(content, indent=1) + "\n").encode()


def write(path: Path, content: bytes) -> None:
    """A new file that is on the disk when this returns."""
    with naming_file(path), open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def copy(source: Path, target: Path) -> None:
    """A copy that is on the disk when this returns, its folder made where there is none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming_file(target), open(target, "wb") as stream:
        for block in _blocks(source):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    shutil.copymode(source, target)


def hurry(file: BinaryIO) -> None:
    """Has the system begin to put on the disk what was written to ``file``, while the caller goes on: less is left for
    the flush at the end. It promises nothing, and does nothing where the system has no such call.
    """
    if (begin := _sync_file_range()) is not None:
        begin(file.fileno(), 0, 0, SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def sync(path: Path) -> None:
    """Flushes a file or a folder that somebody else wrote."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """``sync`` of every file in ``folder``, at any depth."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Where to write, by its name, a file that takes the place of ``path`` only when it is whole and on the disk; it is
    as readable as any new file. What a kill leaves of it is written over.
    """
    temporary = path.with_name(path.name + ".tmp")
    open(temporary, "wb").close()  # made by us: some libraries would make it private
    mode = temporary.stat().st_mode
    yield temporary
    temporary.chmod(mode)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """``replacement``, opened."""
    with replacement(path) as temporary, naming_file(path), temporary.open("wb") as stream:
        yield stream


@contextlib.contextmanager
def written(target: Path, like: Path | None = None) -> Iterator[BinaryIO]:
    """A hidden sibling that becomes ``target`` when all was written and reached the disk, and is removed otherwise;
    what a killed process left of one is written over. ``like`` is the file whose permissions it takes, last of all.

    ValueError where another process is writing it, or what has the sibling's name is none of ours.
    """
    path = beside(target, ".", ".gaugekit-partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming_file(target), _opened(path, like) as file:
        held = lock(file) and path.exists()
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
            sync(target.parent)
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


def lock(file: IO, wait: bool = False) -> bool:
    """Whether this process has the open ``file`` to itself now, until it closes it; always so where the system has no
    such locks. ``wait`` until it has.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _blocks(path: Path) -> Iterator[bytes]:
    with naming_file(path), open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            yield block
