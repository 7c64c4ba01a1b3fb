"""One .safetensors file packed, and one restored, in pieces: memory is bounded whatever the tensors' sizes."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO

import numpy as np
import torch

from ..ops import rans
from ..ops.rans_numpy_crc32c import joined
from . import container
from .blob import encode_bytes
from .container import CorruptFile, Entry, Header, Packed, naming
from .pieces import BlobWriter, StoredBlob, cuts, read_at

MIN_MEMORY_BYTES, MEMORY_BYTES = 64 << 20, 256 << 20
THREADS = (
    2  # one codes while the other reads; the chunks of a piece are coded by as many threads as torch has
)
Advance = Callable[[int], None]


class Crew:
    """Threads that work ahead of what is written, within ``memory_bytes`` of buffers.

    ValueError for fewer than 64 MiB.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES):
        if not isinstance(memory_bytes, int) or memory_bytes < MIN_MEMORY_BYTES:
            raise ValueError(
                f"memory_bytes: expected {MIN_MEMORY_BYTES:,} (64 MiB) or more, got {memory_bytes!r}"
            )
        self.threads = min(THREADS, memory_bytes // MIN_MEMORY_BYTES)
        # Besides what the threads work on, one piece waits and one is written; each has its plain and its coded bytes.
        self.piece_bytes = memory_bytes // (4 * (self.threads + 2))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="gaugekit-codec")

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Iterable[Callable]) -> Iterator:
        """The results of ``tasks``, in order."""
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(task))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def beside(self, task: Callable, *arguments):
        """A future of ``task``, which one of the threads takes on."""
        return self._pool.submit(task, *arguments)

    def step(self, item_bytes: int) -> int:
        """Elements a piece: a multiple of 2^20."""
        return max(1, self.piece_bytes // item_bytes >> 20) << 20


def pack(
    original: Header,
    read: Callable[[Entry, int, int], np.ndarray],
    out: BinaryIO,
    crew: Crew,
    model: int | None,
    advance: Advance,
) -> int:
    """Writes the packed file of ``original`` to the empty file ``out``; returns its bytes.

    ``read(entry, start, stop)`` gives bytes [start, stop) of a tensor. ``model`` is the symbol model of the
    bfloat16 ones. ``advance`` is told the bytes of each piece.
    """
    reserved = container.packed_header_bytes(original)
    stored: list[tuple[Entry, str, int]] = []
    rest: list[Entry] = []
    cursor, begin = 0, 8 + reserved

    def store(entry: Entry, dtype: str, shape: tuple, size: int, codec: str, crc: int) -> None:
        nonlocal cursor
        stored.append((Entry(entry.name, dtype, shape, cursor, cursor + size), codec, crc))
        cursor += size

    coded = [entry for entry in original.entries if container.codable(entry.dtype) and entry.size]
    pieces = {
        entry.name: cuts(entry.weights, crew.step(container.ITEM_BYTES[entry.dtype])) for entry in coded
    }
    blobs = crew.run(partial(_encode, read, e, *cut, model) for e in coded for cut in pieces[e.name])
    for entry in original.entries:
        if entry.name not in pieces:
            rest.append(entry)
            continue
        blob = BlobWriter(out, begin + cursor, entry.shape)
        for start, stop in pieces[entry.name]:
            blob.add(next(blobs))
            advance((stop - start) * container.ITEM_BYTES[entry.dtype])
        size, crc = blob.finish()
        if size < entry.size:
            store(entry, "U8", (size,), size, "rans", crc)
        else:
            rest.append(entry)
    # Blobs are multiples of 16 bytes: with the widest first, every tensor is aligned to its own elements.
    for entry in sorted(rest, key=lambda e: -container.ITEM_BYTES.get(e.dtype, 1)):
        crc = 0
        out.seek(begin + cursor)
        for start in range(0, entry.size, crew.piece_bytes):
            piece = read(entry, start, min(start + crew.piece_bytes, entry.size))
            crc = rans.crc32c(torch.from_numpy(piece), crc)
            out.write(piece)
            if entry.name not in pieces:
                advance(piece.size)
        store(entry, entry.dtype, entry.shape, entry.size, "raw", crc)
    header = container.render_packed(original, stored, reserved)
    out.truncate(begin + cursor)
    out.seek(0)
    out.write(len(header).to_bytes(8, "little") + header)
    return begin + cursor


def _encode(read: Callable, entry: Entry, start: int, stop: int, model: int | None) -> np.ndarray:
    dtype = container.DTYPES[entry.dtype]
    data = torch.from_numpy(read(entry, start * dtype.itemsize, stop * dtype.itemsize)).view(dtype)
    return encode_bytes(data, model=model if dtype == torch.bfloat16 else None).numpy()


def restored(file: BinaryIO, packed: Packed, crew: Crew, advance: Advance) -> Iterator[np.ndarray]:
    """The original file's bytes, piece by piece; every checksum of the packed one is verified, or CorruptFile."""
    header = packed.original.raw
    yield np.frombuffer(len(header).to_bytes(8, "little") + header, np.uint8)
    found = {name: 0 for name in packed.tensors}
    for name, piece, crc, size in crew.run(_restoring(file, packed, crew, found)):
        found[name] = joined(found[name], crc, size)
        advance(size)
        yield piece
    for name, (_, crc) in packed.tensors.items():
        if found[name] != crc:
            raise CorruptFile(f"tensor {name!r}: the checksum of its stored bytes is wrong")


def _restoring(file: BinaryIO, packed: Packed, crew: Crew, found: dict[str, int]) -> Iterator[Callable]:
    places = {entry.name: entry for entry in packed.stored.entries}
    for entry in packed.original.entries:
        place = places[entry.name]
        begin = packed.stored.data_start + place.begin
        if packed.tensors[entry.name][0] == "raw":
            for start in range(0, place.size, crew.piece_bytes):
                size = min(crew.piece_bytes, place.size - start)
                yield partial(_copied, file, entry.name, begin + start, size)
            continue
        with naming(f"tensor {entry.name!r}"):
            blob = StoredBlob(file, begin, place.size, container.DTYPES[entry.dtype], entry.shape)
        found[entry.name] = blob.head_crc
        for part in blob.parts(0, blob.count, crew.piece_bytes):
            yield partial(_decoded, blob, entry.name, *part)


def _copied(file: BinaryIO, name: str, start: int, size: int) -> tuple[str, np.ndarray, int, int]:
    piece = read_at(file, start, size)
    return name, piece, rans.crc32c(torch.from_numpy(piece)), size


def _decoded(blob: StoredBlob, name: str, start: int, stop: int, first: int, until: int):
    with naming(f"tensor {name!r}"):
        coded, head = blob.load(first, until)
        crc, size = rans.crc32c(coded[head:]), coded.numel() - head
        out = torch.empty(stop - start, dtype=blob.dtype)
        rans.open_blob(coded)
        rans.decode(coded, 0, stop - start, out)
    return name, out.view(torch.uint8).numpy(), crc, size


def sha256(pieces: Iterable[np.ndarray]) -> str:
    """The SHA-256 of the bytes of ``pieces``, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
