"""A folder in the making: written beside its place, resumed after a kill, renamed once it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

MANIFEST = "gaugekit_manifest.json"
LOCK = "gaugekit_lock"


class Staging:
    """The folder ``<target>.partial`` in which ``target`` grows, and a manifest there of what is safe on the disk.

    ``state`` is the manifest (JSON): what the job wants to find again after a kill, beside its ``identity``. A Staging
    of the same identity goes on with it where ``sound(folder, state)`` says that what it speaks of is there; another
    identity, or ``resume=False``, starts over from ``start``. ``publish`` renames the folder. A kill between that and
    the end leaves a whole ``target`` that still holds the manifest: then ``published`` is True and ``publish`` only
    tidies up.

    Raises ValueError where ``<target>.partial`` is not ours, or another process is writing there.
    """

    def __init__(
        self,
        target: Path,
        identity: dict,
        start: dict[str, Any],
        *,
        resume: bool = True,
        sound: Callable[[Path, dict], bool] = lambda folder, state: True,
    ):
        self.target, self.folder = target, partial(target)
        self.published = (target / MANIFEST).is_file()
        if self.published:
            self.folder = target
        elif self.folder.exists() and not (self.folder / MANIFEST).is_file() and any(self.folder.iterdir()):
            raise ValueError(
                f"target: expected {str(self.folder)!r} to be free for the work in progress; it is taken"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / LOCK, "w")  # noqa: SIM115 - held until close()
        if not lock(self._lock):
            self._lock.close()
            raise ValueError(f"target: another process is writing {str(self.folder)!r}")
        self.state = {"identity": identity, **start}
        self.resumed = False
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            mine = isinstance(state, dict) and state.get("identity") == identity
            if mine and (self.published or (resume and sound(self.folder, state))):
                self.state, self.resumed = state, True
        if self.published and not self.resumed:
            self.close()
            raise ValueError(f"target: expected a new or empty directory, got {str(target)!r}, which is not")

    def save(self) -> None:
        """Puts ``state`` on the disk; a kill at any moment leaves the old one or the new."""
        temporary = self.folder / (MANIFEST + ".tmp")
        write(temporary, dump(self.state))
        os.replace(temporary, self.folder / MANIFEST)
        sync(self.folder)

    def clean(self, keep: set[str]) -> None:
        """Removes what an earlier run left, except the files (relative names) in ``keep`` and their folders."""
        keep = {MANIFEST, LOCK, *keep}
        folders = {str(parent) for name in keep for parent in Path(name).parents}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = str(path.relative_to(self.folder))
            if path.is_dir() and not path.is_symlink():
                if name not in folders | keep and not any(path.iterdir()):
                    path.rmdir()
            elif name not in keep and not any(str(parent) in keep for parent in Path(name).parents):
                path.unlink()

    def publish(self) -> None:
        """Moves the folder, whose files are all on the disk, into its place."""
        if not self.published:
            sync(self.folder)
            if self.target.exists():
                self.target.rmdir()  # empty: any other is refused before
            os.rename(self.folder, self.target)
            sync(self.target.parent)
        (self.target / LOCK).unlink(missing_ok=True)
        (self.target / MANIFEST).unlink()
        sync(self.target)

    def discard(self) -> None:
        """Removes the folder: the job cannot be finished."""
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Lets another process at the folder; what is on disk stays for it to go on from."""
        self._lock.close()


def lock(file: IO) -> bool:
    """Whether this process has the open ``file`` to itself now, until it closes it; always so where the system has no
    such locks.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def partial(target: Path) -> Path:
    """The folder in which ``target`` grows."""
    return target.with_name(target.name + ".partial")


def check_target(source: Path, target: Path) -> None:
    """ValueError unless the directory ``target`` is new or empty, or was just published, and apart from ``source``."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"target: expected a directory beside the source, got {str(target)!r} for {str(source)!r}"
        )
    if (
        target.exists()
        and not (target / MANIFEST).is_file()
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise ValueError(f"target: expected a new or empty directory, got {str(target)!r}, which is not")


def free_bytes(target: Path) -> int:
    """What the disk of ``target`` has left; what an earlier run of the job holds counts as free."""
    folder = partial(target)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    parent = next(parent for parent in target.resolve().parents if parent.is_dir())
    return shutil.disk_usage(parent).free + held


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal; ``progress`` is told each block's bytes."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
        if progress:
            progress(len(block))
    return digest.hexdigest()


def dump(content: dict) -> bytes:
    """JSON as our files have it."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def write(path: Path, content: bytes) -> None:
    """A new file that is on the disk when this returns."""
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def copy(source: Path, target: Path) -> None:
    """A copy that is on the disk when this returns, its folder made where there is none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as stream:
        for block in _blocks(source):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    shutil.copymode(source, target)


def sync(path: Path) -> None:
    """Flushes a file or a folder that somebody else wrote."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            yield block
