"""Reading .safetensors files, packed or ordinary, as safetensors' own functions read ordinary ones."""

from __future__ import annotations

import math
import os
import queue
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gaugekit.codec.files import container
from gaugekit.codec.files.chain import Chain
from gaugekit.codec.files.container import CorruptFile, Packed, naming
from gaugekit.codec.files.header import Entry
from gaugekit.codec.tensors.blob import fresh
from gaugekit.codec.tensors.buffers import Room
from gaugekit.codec.tensors.dtypes import DTYPES
from gaugekit.codec.tensors.pieces import StoredBlob, read_at
from gaugekit.coder.blob import crc32c

PIECE_BYTES = 1 << 23  # decoded bytes handled at once: the coded bytes of no more than that are in memory


class _Rooms:
    """The memory for the coded bytes of pieces that are decoded at once: as many as torch has threads.

    Used again for piece after piece: fresh bytes between the tensors that stay would leave the heap full of holes.
    """

    def __init__(self):
        self._free: queue.LifoQueue[np.ndarray] = queue.LifoQueue()
        for _ in range(torch.get_num_threads()):
            self._free.put(np.empty(0, np.uint8))

    @contextmanager
    def take(self) -> Iterator[Room]:
        held = self._free.get()

        def room(size: int) -> np.ndarray:
            nonlocal held
            if held.size < size:
                held = np.empty(size, np.uint8)
            return held[:size]

        try:
            yield room
        finally:
            self._free.put(held)


_shared: weakref.WeakValueDictionary[str, _Rooms] = (
    weakref.WeakValueDictionary()
)  # by all files that are open


def _renew_rooms() -> None:
    for rooms in list(_shared.values()):
        rooms.__init__()


if hasattr(os, "register_at_fork"):  # the threads that hold the parent's rooms are missing in its child
    os.register_at_fork(after_in_child=_renew_rooms)


class safe_open:
    """Opens a .safetensors file, packed or ordinary, and returns the original's tensors as asked.

    A drop-in for ``safetensors.safe_open(path, framework="pt", device="cpu")``: keys, metadata, get_tensor, get_slice,
    with or without ``with``. A tensor is read when it is asked for, through no mapping; memory: that tensor and,
    for all files together, 8 MiB of coded bytes a thread of torch. Any thread may read; as many decode at once as torch
    has threads. Bytes of a packed file are checked as they are read: damage raises CorruptFile, which names the file.
    ValueError for another framework, FileNotFoundError where there is no file.
    """

    def __init__(
        self, path: str | os.PathLike, framework: str = "pt", device: str | int | torch.device = "cpu"
    ):
        if framework not in ("pt", "torch", "pytorch"):
            raise ValueError(f"framework: expected 'pt', got {framework!r}")
        self.path, self.device = os.fspath(path), device
        self._file = open(path, "rb")  # noqa: SIM115 - open until __exit__
        try:
            with naming(path):
                header = container.read(self._file)
        except BaseException:
            self._file.close()
            raise
        self.packed = isinstance(header, Packed)
        self._original = header.original if self.packed else header
        self._stored = header.stored if self.packed else header
        self._codecs = header.tensors if self.packed else {}
        self._entries = {entry.name: entry for entry in self._original.entries}
        self._places = {entry.name: entry for entry in self._stored.entries}
        self._blobs: dict[str, StoredBlob] = {}
        self._rooms = _shared.setdefault("rooms", _Rooms())
        self._chain = Chain(self._file, header) if self.packed and header.chained else None
        self._sound: set[str] = set()  # tensors stored raw whose checksum was seen to be right

    def __enter__(self) -> safe_open:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._entries)

    def offset_keys(self) -> list[str]:
        """The names of the tensors in the order in which the original file stores them."""
        return [entry.name for entry in self._original.entries]

    def metadata(self) -> dict[str, str] | None:
        """The original's ``__metadata__``; None where it has none."""
        return self._original.metadata

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor, as the original file has it. ValueError for a name or a dtype that is not known."""
        entry = self._entry(name)
        shape = torch_shape(entry)
        return self._elements(entry, 0, math.prod(shape)).view(shape).to(self.device)

    def get_slice(self, name: str) -> Slice:
        """The tensor, not read yet: ``get_slice(name)[rows]`` decodes only the chunks that hold those rows."""
        return Slice(self, self._entry(name))

    def stored_bytes(self, name: str) -> int:
        """The bytes the tensor takes in this file; of a chained one, its share of them all."""
        entry = self._entry(name)
        if self._chain is not None:
            return self._stored.data_bytes * entry.size // max(self._original.data_bytes, 1)
        return self._places[name].size

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise ValueError(f"{self.path}: expected the name of one of its tensors, got {name!r}")
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{self.path}: tensor {name!r} has dtype {entry.dtype}, which torch lacks")
        if torch_shape(entry) is None:
            raise ValueError(
                f"{self.path}: tensor {name!r} has dtype F4 and shape {list(entry.shape)}; torch holds pairs of "
                "such elements, for which the last dimension must be even"
            )
        return entry

    def _elements(self, entry: Entry, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, torch's elements."""
        if self._chain is not None:
            with naming(self.path):
                return self._chain.tensor(entry).reshape(-1)[start:stop].clone()
        dtype, place = DTYPES[entry.dtype], self._places[entry.name]
        begin = self._stored.data_start + place.begin
        codec, crc = self._codecs.get(entry.name, ("raw", None))
        with naming(self.path), naming(f"tensor {entry.name!r}"):
            if codec == "rans":
                return self._decoded(entry, place, start, stop)
            if crc is not None and (stop - start) * dtype.itemsize != place.size:
                self._check(entry.name, begin, place.size, crc)
            raw = fresh(
                torch.Size([(stop - start) * dtype.itemsize]), torch.uint8
            )  # all of torch's types view bytes
            read_at(self._file, begin + start * dtype.itemsize, raw.numel(), raw.numpy())
            if crc is not None and entry.name not in self._sound and crc32c(raw.numpy()) != crc:
                raise CorruptFile("the checksum of its stored bytes is wrong")
            return raw.view(dtype)

    def _decoded(self, entry: Entry, place: Entry, start: int, stop: int) -> torch.Tensor:
        blob = self._blobs.get(entry.name)
        if blob is None:
            begin = self._stored.data_start + place.begin
            blob = StoredBlob(self._file, begin, place.size, entry.dtype, entry.shape)
            self._blobs[entry.name] = blob
        out = fresh(torch.Size([stop - start]), DTYPES[entry.dtype])
        plain, width = out.view(torch.uint8).numpy(), blob.width
        for first, end, chunk, until in blob.parts(start, stop, PIECE_BYTES):
            with self._rooms.take() as room:
                part = plain[width * (first - start) : width * (end - start)]
                blob.decode(first, end, chunk, until, part, room)
        return out

    def _check(self, name: str, begin: int, size: int, crc: int) -> None:
        """Reads a tensor stored raw once through its checksum: a part of it has none of its own."""
        if name in self._sound:
            return
        checksum = 0
        for offset in range(0, size, PIECE_BYTES):
            piece = read_at(self._file, begin + offset, min(PIECE_BYTES, size - offset))
            checksum = crc32c(piece, checksum)
        if checksum != crc:
            raise CorruptFile("the checksum of its stored bytes is wrong")
        self._sound.add(name)


class Slice:
    """A tensor of an open file that is read when it is indexed, its first dimension only as far as asked for."""

    def __init__(self, file: safe_open, entry: Entry):
        self._file, self._entry = file, entry

    def get_shape(self) -> list[int]:
        """The tensor's shape, in the header's elements: an F4 tensor of torch has half as many in a row."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """The tensor's dtype, in the header's words ("BF16", "F32", ...)."""
        return self._entry.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """What the tensor gives for ``index``; a number or a slice of rows in front limits what is read."""
        parts = index if isinstance(index, tuple) else (index,)
        shape = torch_shape(self._entry)
        rows = range(shape[0]) if shape else range(1)
        if shape and parts and isinstance(parts[0], slice) and (parts[0].step or 1) > 0:
            chosen = rows[parts[0]]
            rows = range(chosen.start, max(chosen.start, chosen.stop))
            parts = (slice(None, None, chosen.step), *parts[1:])
        elif shape and parts and isinstance(parts[0], int) and not isinstance(parts[0], bool):
            if not -shape[0] <= parts[0] < shape[0]:
                raise IndexError(f"row {parts[0]} of tensor {self._entry.name!r}, which has {shape[0]}")
            rows = range(parts[0] % shape[0], parts[0] % shape[0] + 1)
            parts = (0, *parts[1:])
        width = math.prod(shape[1:])
        start, stop = rows.start * width, rows.stop * width
        part = self._file._elements(self._entry, start, stop)
        part = part.view((len(rows), *shape[1:]) if shape else ())
        if self._entry.dtype == "F4":  # which torch indexes only as bytes
            return part.view(torch.uint8)[parts].view(part.dtype).to(self._file.device)
        return part[parts].to(self._file.device)


def torch_shape(entry: Entry) -> tuple[int, ...] | None:
    """The shape of ``entry`` as a tensor of torch, which holds two F4 elements in one; None where it cannot be one."""
    if entry.dtype != "F4":
        return entry.shape
    if not entry.shape or entry.shape[-1] % 2:
        return None
    return (*entry.shape[:-1], entry.shape[-1] // 2)


def load_file(path: str | os.PathLike, device: str | int | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """{name: tensor} of a .safetensors file, packed or ordinary; errors as ``safe_open`` raises them."""
    with safe_open(path, device=device) as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}
