"""Blocks as files of one folder, which one process has to itself: whole and on the disk, or not there."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import torch

from gaugekit.codec.kv.block import KEY_BYTES
from gaugekit.codec.kv.tables import KVTables
from gaugekit.codec.tensors.pieces import read_at
from gaugekit.files.durable import lock, written
from gaugekit.files.places import check_place, placed

SUFFIX, TABLES, LOCK = ".kv", "tables.kvt", ".lock"
BLOCK = re.compile(rf"([0-9a-f]{{{2 * KEY_BYTES}}})\{SUFFIX}")


class KVDirectory:
    """The files of a store's blocks, by their names of ``KEY_BYTES`` bytes, and its tables.

    ValueError where the folder cannot be made or written in, or another process has it.
    """

    def __init__(self, folder: str | os.PathLike):
        if not os.fspath(folder):
            raise ValueError("directory: expected a name, got an empty one ('.' is the current folder)")
        try:
            check_place(Path(folder))
        except ValueError as error:
            raise ValueError("directory" + str(error).removeprefix("target")) from None
        if Path(folder).is_file():
            raise ValueError(f"directory: expected a folder or a new name, got the file {str(folder)!r}")
        self.folder = placed(Path(folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = (self.folder / LOCK).open("ab")
        if not lock(self._held):
            self._held.close()
            raise ValueError(f"directory: another process keeps its blocks in {str(self.folder)!r}")

    def scan(self) -> list[tuple[bytes, int]]:
        """(name, bytes) of every block, the first written first. What a killed process left half written is removed."""
        entries = []
        for entry in os.scandir(self.folder):
            match = BLOCK.fullmatch(entry.name)
            if match and entry.is_file(follow_symlinks=False):
                status = entry.stat()
                entries.append((status.st_mtime_ns, bytes.fromhex(match[1]), status.st_size))
        for partial in self.folder.glob(".*.gaugekit-partial"):
            if BLOCK.fullmatch(partial.name.removeprefix(".").removesuffix(".gaugekit-partial")):
                partial.unlink()
        return [(name, size) for _, name, size in sorted(entries)]

    def path(self, name: bytes) -> Path:
        """The block's file."""
        return self.folder / (name.hex() + SUFFIX)

    def read(self, name: bytes) -> torch.Tensor | None:
        """uint8 [bytes] of the file, or None where there is none."""
        try:
            with self.path(name).open("rb") as file:
                return torch.from_numpy(read_at(file, 0, os.fstat(file.fileno()).st_size))
        except FileNotFoundError:
            return None

    def write(self, name: bytes, data: torch.Tensor) -> None:
        """The file, on the disk when this returns; OSError leaves what was there."""
        with written(self.path(name)) as file:
            file.write(data.numpy())

    def remove(self, name: bytes) -> None:
        """Removes the file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self.path(name).unlink()

    def load_tables(self) -> KVTables | None:
        """The tables that the blocks were coded with; None where there are none, CorruptFile where they are damaged."""
        path = self.folder / TABLES
        return KVTables.load(path) if path.exists() else None

    def save_tables(self, tables: KVTables) -> None:
        tables.save(self.folder / TABLES)

    def close(self) -> None:
        """Another process may have the folder."""
        self._held.close()
