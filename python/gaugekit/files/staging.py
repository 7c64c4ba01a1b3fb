"""A folder in the making: written beside its place, resumed after a kill, renamed once it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gaugekit.files.durable import dump, lock, replacing, sync
from gaugekit.files.places import beside, check_place, holds, placed

MANIFEST = "gaugekit_manifest.json"
LOCK = "gaugekit_lock"
OWN = (MANIFEST, MANIFEST + ".tmp", LOCK)


class Staging:
    """The folder ``<target>.partial`` in which ``target`` grows, and a manifest there of what is safe on the disk.

    ``state`` is the manifest (JSON): what the job wants to find again after a kill, beside its ``identity``. A Staging
    of the same identity goes on with it where ``sound(folder, state)`` says that what it speaks of is there, else it
    starts over from ``start``; ``resume=False`` always does. ``publish`` renames the folder. A kill between that and
    the end leaves a whole ``target`` that still holds the manifest: then ``published`` is True and ``publish`` only
    tidies up. An empty folder that cannot be replaced (a mount, the current folder, or one whose parent is not
    writable) is the place of work itself; there the manifest is what says that it is unfinished. With ``inside`` the
    folder ``target`` always is, and stays what it is: a place of work that is kept, with nothing to publish. Errors
    name it as the caller's ``argument``.

    Raises ValueError where ``<target>.partial`` is not ours or holds the unfinished work of another identity, or where
    another process is writing.
    """

    def __init__(
        self,
        target: Path,
        identity: dict,
        start: dict[str, Any],
        *,
        resume: bool = True,
        sound: Callable[[Path, dict], bool] = lambda folder, state: True,
        inside: bool = False,
        argument: str = "target",
    ):
        self.target, self._argument = placed(target), argument
        self.folder = self.target if inside else _workplace(self.target)
        # Before the folder is made: the manifest of a target says whether it is whole or the place of work.
        unfinished = (_manifest(self.target) or {}).get("inside", not (self.target / MANIFEST).is_file())
        self.published = not unfinished
        if not self.published and not _ours(self.folder):
            raise ValueError(
                f"{argument}: expected {str(self.folder)!r} to be free for the work in progress; it is taken"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / LOCK, "w")  # noqa: SIM115 - held until close()
        try:
            if not lock(self._lock):
                raise ValueError(f"{argument}: another process is writing {str(self.folder)!r}")
            self.state = {"identity": identity, **start}
            self.resumed = False
            self._go_on(identity, resume, sound, inside)
        except BaseException:
            self.close()
            raise
        if self.folder == self.target and not self.published:
            self.state["inside"] = True

    def _go_on(self, identity: dict, resume: bool, sound: Callable[[Path, dict], bool], inside: bool) -> None:
        """Takes up what an earlier run left, where it is the same job."""
        state = _manifest(self.folder)
        if state is not None and state.get("identity") == identity:
            if self.published or (resume and sound(self.folder, state)):
                self.state, self.resumed = state, True
        elif state is not None and resume and not self.published:
            differs = ", ".join(_differences(state.get("identity"), identity))
            what = "the" if inside else "unfinished"
            cure = (
                "delete it or give another"
                if inside
                else "delete that folder, or pass resume=False, to start over"
            )
            raise ValueError(
                f"{self._argument}: {str(self.folder)!r} holds {what} work of another call ({differs} differs); {cure}"
            )
        if self.published and not self.resumed:
            raise ValueError(
                f"{self._argument}: expected a new or empty directory, got {str(self.target)!r}, which is not"
            )

    def save(self) -> None:
        """Puts ``state`` on the disk; a kill at any moment leaves the old one or the new."""
        with replacing(self.folder / MANIFEST) as file:
            file.write(dump(self.state))

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

    def publish(self, modes: dict[str, int] | None = None) -> None:
        """Moves the folder, whose files are all on the disk, into its place.

        ``modes`` are the permissions of folders, by relative name ("." is the folder itself). They are set last: a
        folder that may not be written in could not be finished.
        """
        if not self.published:
            for folder, _, _ in os.walk(self.folder):
                sync(Path(folder))
            if self.state.pop("inside", False):
                self.save()
            else:
                if self.target.exists():
                    self.target.rmdir()  # empty: any other is refused before
                os.rename(self.folder, self.target)
                sync(self.target.parent)
        deepest_first = sorted(modes or {}, key=lambda name: -len(Path(name).parts))
        for name in deepest_first:
            if name != ".":
                (self.target / name).chmod(stat.S_IMODE(modes[name]))
        (self.target / LOCK).unlink(missing_ok=True)
        (self.target / MANIFEST).unlink()
        sync(self.target)
        if "." in deepest_first:
            self.target.chmod(stat.S_IMODE(modes["."]))

    def discard(self) -> None:
        """Removes what was made: the job cannot be finished. What has the target's name already stays."""
        if self.published:
            return
        self.clean(set())
        for name in (MANIFEST, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        if self.folder != self.target:
            self.folder.rmdir()

    def close(self) -> None:
        """Lets another process at the folder; what is on disk stays for it to go on from."""
        self._lock.close()

    @contextlib.contextmanager
    def until_closed(self, hopeless: type[Exception]) -> Iterator[None]:
        """Closes at the end; discards first after a ``hopeless`` error: the same call would end so again."""
        try:
            yield
        except hopeless:
            self.discard()
            raise
        finally:
            self.close()


def workplace(
    folder: str | os.PathLike,
    identity: dict,
    start: dict[str, Any],
    sound: Callable[[Path, dict], bool] = lambda folder, state: True,
) -> Staging:
    """A user's ``work_directory``: a Staging in the folder itself, which is new, empty or a job's own; its manifest is
    on the disk, and what no manifest speaks of is gone.
    """
    place = Path(os.path.realpath(folder))
    staged = Staging(place, identity, start, sound=sound, inside=True, argument="work_directory")
    if not staged.resumed:
        staged.clean(set())
        staged.save()
    return staged


def _manifest(folder: Path) -> dict | None:
    """What the manifest in ``folder`` says; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        state = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return state if isinstance(state, dict) else None
    return None


def _ours(folder: Path) -> bool:
    """Whether nothing but what a Staging made can be in ``folder``: it is new, empty, or marked by a manifest (which a
    kill in the first moment leaves unwritten).
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return False
    if not folder.exists() or _manifest(folder) is not None:
        return True
    return {path.name for path in folder.iterdir()} <= {LOCK, MANIFEST + ".tmp"}


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two identities differ, in words; at most three places."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [name or "the job"]
    keys = [*new, *(key for key in old if key not in new)]
    places = [_differences(old.get(key), new.get(key), f"{name} {key}".strip()) for key in keys]
    return [place for group in places for place in group][:3]


def _workplace(target: Path) -> Path:
    """Where ``target`` grows: beside itself, or in itself where it cannot be replaced."""
    if not target.is_dir():
        return partial(target)
    if (_manifest(target) or {}).get("inside", (target / MANIFEST).is_file()):
        return target
    fixed = os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK)
    return target if fixed or os.path.realpath(os.curdir) == str(target) else partial(target)


def partial(target: Path) -> Path:
    """The folder in which ``target`` grows."""
    return beside(target, "", ".partial")


def check_target(source: Path, target: Path) -> None:
    """ValueError unless the directory ``target`` is new or empty, or was just published, and apart from ``source``; a
    link, or a place that cannot be written, is refused too, and so is a source that is somebody's unfinished work.
    """
    check_place(target)
    for name in (placed, partial):
        place = name(target)
        if holds(source, place) or holds(place, source):
            raise ValueError(
                f"target: expected a directory beside the source, got {str(target)!r} for {str(source)!r}"
            )
    if (
        target.exists()
        and not (target / MANIFEST).is_file()
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise ValueError(f"target: expected a new or empty directory, got {str(target)!r}, which is not")
    for name in OWN:
        if os.path.lexists(source / name):
            raise ValueError(
                f"source: expected finished work, but {str(source)!r} holds {name}: a job writes there"
            )


def free_bytes(target: Path) -> int:
    """What the disk of ``target`` has left; what an earlier run of the job holds counts as free."""
    folder = _workplace(placed(target))
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    place = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(place).free + held
