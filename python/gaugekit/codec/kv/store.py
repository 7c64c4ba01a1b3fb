"""A bounded store of key/value blocks: coded in memory, on the disk, or both."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gaugekit.codec.kv.block import KVCodec, check_block, key_digest
from gaugekit.codec.kv.directory import KVDirectory
from gaugekit.codec.kv.ledger import Ledger
from gaugekit.codec.kv.tables import EXPONENTS, KVTables
from gaugekit.ops.rans.operator import CorruptFile

CALIBRATION_TOKENS = 16  # a first block of fewer says too little of its channels


@dataclass
class KVStats:
    """What a store holds, and what it was asked for since it was opened."""

    memory_blocks: int = 0
    memory_bytes: int = 0
    disk_blocks: int = 0
    disk_bytes: int = 0
    plain_bytes: int = 0  # of the blocks put, before coding
    coded_bytes: int = 0  # of the same blocks, after
    hits: int = 0
    misses: int = 0
    evicted: int = 0  # blocks that are no longer held anywhere, because others needed the room
    damaged: int = 0


class KVStore:
    """Blocks of a key/value cache by key, coded without loss: at most ``memory_bytes`` of them in memory, and with
    ``directory`` at most ``disk_bytes`` there.

    With a directory ``put`` returns once the block is whole on the disk, and the memory holds the most recently used
    ones as well; a store opened there later has all of them. Without one the memory is all there is. Where there is no
    room, those used longest ago go (of a directory that was opened again, those written first). A bound counts coded
    bytes. One process has a directory to itself; its threads may put and get at the same time.

    ``axes``, ``layout`` and ``symbols`` are those of ``KVCodec``. ``tables`` default to those in the directory; where
    there are none, the first block of 16 tokens or more is calibrated, or with ``tables=False`` none. With tables,
    blocks are of their dtype, parts, layers and channels.

    ValueError for bounds that are not positive, a directory that another process has or that was written with other
    tables; CorruptFile where the directory's tables are damaged.
    """

    def __init__(
        self,
        directory: str | os.PathLike | None = None,
        *,
        axes: str = "PLSD",
        memory_bytes: int = 1 << 30,
        disk_bytes: int = 1 << 34,
        tables: KVTables | bool | None = None,
        layout: str = "rans",
        symbols: str | None = None,
    ):
        for name, size in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            least = 1 if name == "disk_bytes" or directory is None else 0
            if not isinstance(size, int) or size < least:
                raise ValueError(f"{name}: expected a number of bytes, {least} or more, got {size!r}")
        if not isinstance(tables, KVTables) and tables is not None and tables is not False:
            raise ValueError(f"tables: expected KVTables, None or False, got {tables!r}")
        self._codec = KVCodec(axes, layout=layout, symbols=symbols)
        self._calibrates = tables is None
        self._memory, self._disk = Ledger(memory_bytes), Ledger(disk_bytes)
        self._blocks: dict[bytes, torch.Tensor] = {}
        self._stats, self._closed = KVStats(), False
        self._turn, self._writing = threading.Condition(), set()
        # the last read of each block from the disk, until it ends or somebody writes or removes the block
        self._reading: dict[bytes, object] = {}
        self._calibration = threading.Lock()
        self._directory = None if directory is None else KVDirectory(directory)
        try:
            self._open(tables)
        except BaseException:
            self.close()
            raise

    def _open(self, tables: KVTables | bool | None) -> None:
        given = tables if isinstance(tables, KVTables) else None
        if self._directory is None:
            self._codec.tables = given
            return
        stored = self._directory.load_tables()
        if given is not None and stored is not None and given.digest != stored.digest:
            raise ValueError(
                f"tables: expected those that {str(self._directory.folder)!r} was written with ({stored.digest:016x}), "
                f"or None to take them, got {given.digest:016x}"
            )
        if given is not None and stored is None:
            self._directory.save_tables(given)
        self._codec.tables = given or stored
        self._calibrates = self._calibrates and self._codec.tables is None
        for name, size in self._directory.scan():
            room, gone = self._disk.reserve(size, name)
            if room:
                self._disk.settle(size, name)
            for other in gone if room else [name]:
                self._directory.remove(other)

    @property
    def tables(self) -> KVTables | None:
        """The tables that blocks are coded with; None before any were calibrated."""
        return self._codec.tables

    def put(self, key: str | bytes, block: torch.Tensor) -> int:
        """Keeps ``block`` under ``key``, instead of what was there; the bytes it takes.

        ValueError for a block that ``KVCodec.encode`` does not take or that is larger than the store, OSError where the
        disk fails. Neither leaves anything half written, or what was under the key damaged.
        """
        name = self._name(key)
        check_block(block)
        self._calibrate(block)
        data = self._codec.encode(block, key)
        size, bound = data.numel(), (self._disk if self._directory else self._memory).limit_bytes
        if size > bound:
            raise ValueError(
                f"block: expected at most {bound:,} coded bytes, the store's bound, got {size:,}"
            )
        with self._alone(name):
            if self._directory is not None:
                self._write(name, data)
            with self._turn:
                self._keep(name, data)
                self._stats.plain_bytes += block.nbytes
                self._stats.coded_bytes += size
        return size

    def get(self, key: str | bytes, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The block under ``key``, in ``out`` where one is given; None where there is none.

        CorruptFile, naming the file, where it is damaged: it is then no longer there, so that the next call says None
        and it can be put again. ValueError for an ``out`` that does not fit. After an error, ``out`` is undefined.
        """
        name = self._name(key)
        with self._turn:
            data = self._blocks.get(name)
            held = self._memory.touch(name) | self._disk.touch(name)
        if data is not None:
            try:
                return self._counted(self._codec.decode(data, out, key))
            except CorruptFile as error:  # the memory erred; the disk may have it whole
                with self._turn:
                    self._forget(name, data)
                    self._stats.damaged += 1
                if self._directory is None:
                    raise CorruptFile(f"the block {key!r} in memory: {error}") from None
        if not held or self._directory is None:
            return self._missed(name)
        with self._reads(name) as read:
            data = self._directory.read(name)
            if data is None:
                return self._missed(name)
            return self._counted(self._decoded(name, data, out, key, read))

    @contextlib.contextmanager
    def _reads(self, name: bytes) -> Iterator[object]:
        """What stands under the block's name in ``_reading`` until somebody writes or removes the block."""
        read = object()
        with self._turn:
            if name not in self._writing:
                self._reading[name] = read
        try:
            yield read
        finally:
            with self._turn:
                if self._reading.get(name) is read:
                    del self._reading[name]

    def _decoded(
        self, name: bytes, data: torch.Tensor, out: torch.Tensor | None, key: str | bytes, read: object
    ) -> torch.Tensor:
        """A block read from the disk, kept in memory from now on, unless it was written or removed since ``read``
        began; a damaged one is removed.
        """
        try:
            block = self._codec.decode(data, out, key)
        except CorruptFile as error:
            path = self._directory.path(name)
            with self._alone(name), self._turn:
                again = self._directory.read(name)
                if again is not None and torch.equal(again, data):  # not one that was put meanwhile
                    self._disk.drop(name)
                    self._directory.remove(name)
                self._stats.damaged += 1
            raise CorruptFile(f"{path}: {error}") from None
        with self._turn:
            if self._reading.get(name) is read and name in self._disk.sizes and name not in self._blocks:
                self._keep(name, data)
        return block

    def remove(self, key: str | bytes) -> bool:
        """Whether there was a block under ``key``; there is none now."""
        name = self._name(key)
        with self._alone(name), self._turn:
            held = self._forget(name) | self._disk.drop(name)
            if self._directory is not None:
                self._directory.remove(name)
        return held

    def clear(self) -> None:
        """Removes every block; the tables stay."""
        with self._turn:
            self._turn.wait_for(lambda: not self._writing)
            if self._closed:
                return
            for name in list(self._disk.sizes):
                self._disk.drop(name)
                self._directory.remove(name)
            for name in list(self._blocks):
                self._forget(name)

    def __contains__(self, key: str | bytes) -> bool:
        name = self._name(key)
        with self._turn:
            return name in self._blocks or name in self._disk.sizes

    def __len__(self) -> int:
        with self._turn:
            return len(self._disk.sizes if self._directory is not None else self._blocks)

    def stats(self) -> KVStats:
        """What is held and was asked for."""
        with self._turn:
            counts = vars(self._stats) | {
                "memory_blocks": len(self._memory.sizes),
                "memory_bytes": self._memory.held_bytes,
                "disk_blocks": len(self._disk.sizes),
                "disk_bytes": self._disk.held_bytes,
            }
        return KVStats(**counts)

    def close(self) -> None:
        """Ends the store, once nobody writes: another process may have the directory; blocks in memory are let go."""
        with self._turn:
            self._turn.wait_for(lambda: not self._writing)
            self._closed = True
            self._blocks.clear()
            if self._directory is not None:
                self._directory.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("store: expected an open one, got one that was closed")

    def _name(self, key: str | bytes) -> bytes:
        """The name of ``key``; ValueError where the store was closed."""
        self._check_open()
        return key_digest(key)

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _calibrate(self, block: torch.Tensor) -> None:
        """Makes the tables from the first block that tells enough, and writes them before any block needs them."""
        takes = (
            block.dtype in EXPONENTS and block.device.type == "cpu" and block.dim() == len(self._codec.axes)
        )
        if not self._calibrates or not takes or block.shape[self._codec.axes.index("S")] < CALIBRATION_TOKENS:
            return
        with self._calibration:
            if self._calibrates:
                tables = KVTables.calibrate(block, self._codec.axes)
                if self._directory is not None:
                    self._directory.save_tables(tables)
                self._codec.tables, self._calibrates = tables, False

    @contextlib.contextmanager
    def _alone(self, name: bytes) -> Iterator[None]:
        """Nobody else writes or removes the block meanwhile."""
        with self._turn:
            self._turn.wait_for(lambda: name not in self._writing)
            self._check_open()
            self._writing.add(name)
            self._reading.pop(name, None)
        try:
            yield
        finally:
            with self._turn:
                self._writing.remove(name)
                self._turn.notify_all()

    def _write(self, name: bytes, data: torch.Tensor) -> None:
        """The block on the disk, others having gone for it where they had to."""
        size = data.numel()
        with self._turn:
            while True:
                room, gone = self._disk.reserve(size, name, kept=self._writing)
                for other in gone:
                    self._forget(other)
                    self._directory.remove(other)
                self._stats.evicted += len([other for other in gone if other != name])
                if room:
                    break
                self._turn.wait()
        written = False
        try:
            self._directory.write(name, data)
            written = True
        finally:
            with self._turn:
                self._disk.settle(size, name, written)
                if not written:
                    self._recount(name)
                self._turn.notify_all()

    def _recount(self, name: bytes) -> None:
        """Counts what lies on the disk after an error: the old block or, where only the folder's flush failed, the new
        one; in the lock.
        """
        self._forget(name)
        self._disk.drop(name)
        with contextlib.suppress(OSError):
            size = self._directory.path(name).stat().st_size
            self._disk.reserve(size, name)  # at most what was reserved, or held
            self._disk.settle(size, name)

    def _keep(self, name: bytes, data: torch.Tensor) -> None:
        """Holds the block in memory, if it has room for it at all; in the lock."""
        self._forget(name)
        if data.numel() > self._memory.limit_bytes:
            return
        _, gone = self._memory.reserve(data.numel(), name)
        for other in gone:
            self._blocks.pop(other, None)
        if self._directory is None:
            self._stats.evicted += len(gone)
        self._memory.settle(data.numel(), name)
        self._blocks[name] = data

    def _forget(self, name: bytes, data: torch.Tensor | None = None) -> bool:
        """Drops the block from memory, where ``data`` is given only that one; in the lock."""
        if data is not None and self._blocks.get(name) is not data:
            return False
        self._blocks.pop(name, None)
        return self._memory.drop(name)

    def _counted(self, block: torch.Tensor) -> torch.Tensor:
        with self._turn:
            self._stats.hits += 1
        return block

    def _missed(self, name: bytes) -> None:
        with self._turn:
            self._stats.misses += 1
            if (
                name in self._disk.sizes
                and name not in self._writing
                and not self._directory.path(name).exists()
            ):
                self._disk.drop(name)  # somebody removed the file
