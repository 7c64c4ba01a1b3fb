"""One .safetensors file packed, and one restored, in pieces: memory is bounded whatever the tensors' sizes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from gaugekit.codec.files import bundle, container
from gaugekit.codec.files.container import CorruptFile, Packed, naming
from gaugekit.codec.files.header import BITS, Entry, Header
from gaugekit.codec.tensors.buffers import Buffers, Room
from gaugekit.codec.tensors.pieces import BlobWriter, StoredBlob, cuts, read_at
from gaugekit.coder import blob as coder
from gaugekit.coder.blob import ELEMENTS, encode_bytes
from gaugekit.coder.crc32c import joined
from gaugekit.coder.header import chunk_count
from gaugekit.files.durable import hurry

MIN_MEMORY_BYTES, MEMORY_BYTES = 64 << 20, 256 << 20
THREADS = (
    2  # one codes while the other reads; the chunks of a piece are coded by as many threads as torch has
)
LEAST_BLOB_BYTES = 96  # header, index and padding: nothing smaller gains
CHUNK_LOG2 = 17  # of the symbols a chunk, as ``pack`` makes them
# What the names of tensors in the file's own header may cost at most: any reader can list it for that.
SLACK_BYTES = 4096 - bundle.START
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
        # Besides what the threads work on, one piece waits and one is written; each has its plain and its coded bytes,
        # and the C library keeps up to half as much again of freed ones for each thread.
        self.piece_bytes = memory_bytes // (6 * (self.threads + 2))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="gaugekit-codec")
        self.buffers = Buffers()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
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

    def beside(self, task: Callable, *arguments: Any) -> Future:
        """A future of ``task``, which one of the threads takes on."""
        return self._pool.submit(task, *arguments)

    def step(self, item_bytes: int) -> int:
        """Elements a piece: a multiple of 2^20."""
        return max(1, self.piece_bytes // item_bytes >> 20) << 20


def check_symbols(symbols: str | None) -> None:
    """ValueError unless ``symbols`` are some that bfloat16 can have, or None."""
    if symbols is not None and symbols not in ELEMENTS["BF16"].symbols:
        expected = ", ".join(map(repr, ELEMENTS["BF16"].symbols))
        raise ValueError(f"symbols: expected None or one of {expected}, got {symbols!r}")


def pack(
    original: Header,
    read: Callable[[Entry, int, int, Room], np.ndarray],
    out: BinaryIO,
    crew: Crew,
    symbols: str | None,
    advance: Advance,
) -> int:
    """Writes the packed file of ``original`` to the empty file ``out``; returns its bytes.

    ``read(entry, start, stop, room)`` gives bytes [start, stop) of a tensor, in memory that stays, or in what
    ``room`` gives, which does not. ``symbols`` are those of the bfloat16 ones. ``advance`` is told the bytes of each
    piece. The file's header lists the tensors (version 1) unless that cannot be, or makes a file that is larger than
    the original by more than a few KB (version 2).
    """
    reserved = container.packed_header_bytes(original)
    begin = bundle.START if reserved is None else 8 + reserved
    stored = _store(original, read, out, begin, crew, symbols, advance)
    end = stored[-1][0].end if stored else 0
    if reserved is not None and begin + end <= original.file_bytes + SLACK_BYTES:
        header = container.render_packed(original, stored, reserved)
    else:
        _move_down(out, begin, bundle.START, end, crew.piece_bytes)
        begin = bundle.START
        header, section = container.render_bundled(original, stored)
        out.seek(begin + end)
        out.write(section)
        end += len(section)
    out.truncate(begin + end)
    out.seek(0)
    out.write(len(header).to_bytes(8, "little") + header)
    return begin + end


def most_bytes(original: Header) -> int:
    """What ``pack`` may take while it writes: every tensor raw, and behind them the attempt to code the last."""
    reserved = container.packed_header_bytes(original)
    sections = len(original.raw) + bundle.ROW_BYTES * len(original.entries)
    begin = bundle.START + sections if reserved is None else 8 + max(reserved, bundle.START + sections)
    coded = [entry for entry in original.entries if container.codable(entry.dtype)]
    beyond = max((64 + 8 * len(e.shape) + 48 * chunk_count(e.weights, CHUNK_LOG2) for e in coded), default=0)
    return begin + original.data_bytes + beyond


def _store(
    original: Header,
    read: Callable,
    out: BinaryIO,
    begin: int,
    crew: Crew,
    symbols: str | None,
    advance: Advance,
) -> list[tuple[Entry, str, int]]:
    """Writes all tensors from ``begin`` on: [(entry, codec, crc32c)] in the order in which they stand."""
    stored: list[tuple[Entry, str, int]] = []
    rest: list[Entry] = []
    cursor = 0

    def store(entry: Entry, dtype: str, shape: tuple, size: int, codec: str, crc: int) -> None:
        nonlocal cursor
        stored.append((Entry(entry.name, dtype, shape, cursor, cursor + size), codec, crc))
        cursor += size

    coded = [e for e in original.entries if container.codable(e.dtype) and e.size > LEAST_BLOB_BYTES]
    pieces = {entry.name: cuts(entry.weights, crew.step(BITS[entry.dtype] // 8)) for entry in coded}
    blobs = crew.run(partial(_encode, read, crew, e, *cut, symbols) for e in coded for cut in pieces[e.name])
    for entry in original.entries:
        if entry.name not in pieces:
            rest.append(entry)
            continue
        blob = BlobWriter(out, begin + cursor, entry.shape)
        for start, stop in pieces[entry.name]:
            piece = next(blobs)
            blob.add(piece)
            crew.buffers.give(piece)
            advance((stop - start) * BITS[entry.dtype] // 8)
        size, crc = blob.finish()
        if size < entry.size:
            store(entry, "U8", (size,), size, "rans", crc)
        else:
            rest.append(entry)
    # Blobs are multiples of 16 bytes: with the widest first, every tensor is aligned to its own elements.
    for entry in sorted(rest, key=lambda e: -BITS.get(e.dtype, 8)):
        crc = 0
        out.seek(begin + cursor)
        for start in range(0, entry.size, crew.piece_bytes):
            with crew.buffers.room() as room:
                piece = read(entry, start, min(start + crew.piece_bytes, entry.size), room)
                crc = coder.crc32c(piece, crc)
                out.write(piece)
            hurry(out)
            if entry.name not in pieces:
                advance(piece.size)
        store(entry, entry.dtype, entry.shape, entry.size, "raw", crc)
    return stored


def _move_down(file: BinaryIO, begin: int, to: int, size: int, piece_bytes: int) -> None:
    """Bytes [begin, begin + size) of ``file`` to ``to``, which is not behind ``begin``."""
    file.flush()
    for at in range(0, size if to < begin else 0, piece_bytes):
        piece = read_at(file, begin + at, min(piece_bytes, size - at))
        file.seek(to + at)
        file.write(piece)


def _encode(
    read: Callable, crew: Crew, entry: Entry, start: int, stop: int, symbols: str | None
) -> np.ndarray:
    width, symbols = ELEMENTS[entry.dtype].width, symbols if entry.dtype == "BF16" else None
    with crew.buffers.room() as room:
        data = read(entry, start * width, stop * width, room)
        return encode_bytes(data, (stop - start,), entry.dtype, symbols, room=crew.buffers.take)


def restored(file: BinaryIO, packed: Packed, crew: Crew, advance: Advance) -> Iterator[np.ndarray]:
    """The original file's bytes, piece by piece; every checksum of the packed one is verified, or CorruptFile. A piece
    is good until the next one is asked for: its memory is used again.
    """
    header = packed.original.raw
    yield np.frombuffer(bytearray(len(header).to_bytes(8, "little") + header), np.uint8)
    if packed.chained:
        from gaugekit.codec.files.chain import Chain  # torch's work

        yield from Chain(file, packed).plain()
        advance(packed.stored.data_bytes)
        return
    sums = {name: 0 for name in packed.tensors}
    for name, piece, crc, size in crew.run(_restoring(file, packed, crew, sums)):
        sums[name] = joined(sums[name], crc, size)
        advance(size)
        yield piece
        crew.buffers.give(piece)
    for name, (_, crc) in packed.tensors.items():
        if sums[name] != crc:
            raise CorruptFile(f"tensor {name!r}: the checksum of its stored bytes is wrong")


def _restoring(file: BinaryIO, packed: Packed, crew: Crew, sums: dict[str, int]) -> Iterator[Callable]:
    places = {entry.name: entry for entry in packed.stored.entries}
    for entry in packed.original.entries:
        place = places[entry.name]
        begin = packed.stored.data_start + place.begin
        if packed.tensors[entry.name][0] == "raw":
            for start in range(0, place.size, crew.piece_bytes):
                size = min(crew.piece_bytes, place.size - start)
                yield partial(_copied, crew, file, entry.name, begin + start, size)
            continue
        with naming(f"tensor {entry.name!r}"):
            blob = StoredBlob(file, begin, place.size, entry.dtype, entry.shape)
        sums[entry.name] = blob.head_crc
        for part in blob.parts(0, blob.count, crew.piece_bytes):
            yield partial(_decoded, crew, blob, entry.name, *part)


def _copied(crew: Crew, file: BinaryIO, name: str, start: int, size: int) -> tuple[str, np.ndarray, int, int]:
    piece = read_at(file, start, size, crew.buffers.take(size))
    return name, piece, coder.crc32c(piece), size


def _decoded(crew: Crew, blob: StoredBlob, name: str, start: int, stop: int, first: int, until: int):
    with naming(f"tensor {name!r}"), crew.buffers.room() as room:
        coded, head = blob.load(first, until, room)
        crc, size = coder.crc32c(coded[head:]), coded.size - head
        out = crew.buffers.take((stop - start) * blob.width)
        coder.decode(coded, 0, stop - start, out)
    return name, out, crc, size


def restores(packed: BinaryIO, source: BinaryIO, crew: Crew) -> bool:
    """Whether unpacking ``packed`` gives the bytes of ``source``; CorruptFile where it is damaged."""
    content = container.read(packed)
    size = os.fstat(source.fileno()).st_size
    if not isinstance(content, Packed) or content.original.file_bytes != size:
        return False
    at = 0
    for piece in restored(packed, content, crew, lambda size: None):
        with crew.buffers.room() as room:
            if not np.array_equal(piece, read_at(source, at, piece.size, room(piece.size))):
                return False
        at += piece.size
    return True
