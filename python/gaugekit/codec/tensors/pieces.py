"""A coded blob in pieces: a file's blob decoded, and made, without ever holding the whole of it.

The chunks of a blob stand by themselves (docs/format.md), so some of them, behind a header and an index of their own,
are a blob of that part of the tensor. Taking a blob apart and putting one together is the same step both ways.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO

import numpy as np

from gaugekit.codec.tensors.buffers import Room
from gaugekit.coder import blob as coder
from gaugekit.coder.blob import BY_NUMBER, ELEMENTS, CorruptFile
from gaugekit.coder.crc32c import joined
from gaugekit.coder.header import ENTRY, FIELDS, BlobHeader, header_of
from gaugekit.files.durable import hurry
from gaugekit.files.places import naming_file


def _new(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


def read_at(file: BinaryIO, start: int, size: int, into: np.ndarray | None = None) -> np.ndarray:
    """``size`` bytes of ``file`` from ``start``, uint8; any thread may ask at any time. CorruptFile where the file ends
    before.
    """
    data = _new(size) if into is None else into
    done = 0
    with naming_file(file.name):
        while done < size:
            got = os.preadv(file.fileno(), [memoryview(data)[done:]], start + done)
            if not got:
                raise CorruptFile("the file ends within a tensor")
            done += got
    return data


def render(like: BlobHeader, shape: tuple[int, ...], entries: np.ndarray) -> bytes:
    """Header, shape and index of a blob of ``shape`` with these chunks, of the type and symbols of the header ``like``.

    Offsets are made anew: the first chunk follows the index, each other one the one before it.
    """
    header, entries = replace(like, shape=shape), entries.copy()
    lengths = entries["length"].astype(np.uint64)
    entries["offset"] = header.index_end + np.cumsum(lengths) - lengths
    index, length = entries.tobytes(), header.index_end + int(lengths.sum())
    return replace(header, length=length, index_crc=coder.crc32c(index)).render() + index


def split(blob: np.ndarray) -> tuple[BlobHeader, np.ndarray, np.ndarray]:
    """The header, the index and the chunks of a blob that was just made."""
    header = header_of(blob)
    index = blob[header.index_begin : header.index_end]
    return header, np.frombuffer(index.tobytes(), ENTRY), blob[header.index_end :]


class StoredBlob:
    """The blob at [start, start + size) of an open file, its header and index read and checked; decoded by parts.

    ``dtype`` and ``shape`` are what the file's header says of it, in its words. CorruptFile where the blob does not
    agree.
    """

    def __init__(self, file: BinaryIO, start: int, size: int, dtype: str, shape: tuple[int, ...]):
        self.file, self.start, self.dtype, self.shape = file, start, dtype, shape
        self.count, self.width = math.prod(shape), ELEMENTS[dtype].width
        self.header, self.entries = self._opened(size)
        self.log2 = self.header.chunk_log2

    def _opened(self, size: int) -> tuple[BlobHeader, np.ndarray]:
        start = read_at(self.file, self.start, min(size, FIELDS.size)).tobytes()
        head = read_at(self.file, self.start, min(size, coder.header_bytes(start))).tobytes()
        header = coder.parse_header(head, size)
        dtype = BY_NUMBER[header.element]
        if dtype != self.dtype or header.shape != tuple(self.shape):
            said, found = (f"torch.{ELEMENTS[name].torch}" for name in (self.dtype, dtype))
            raise CorruptFile(
                f"the header says {said} {list(self.shape)}, its blob {found} {list(header.shape)}"
            )
        index = read_at(self.file, self.start + header.index_begin, header.index_end - header.index_begin)
        index_crc = coder.crc32c(index)
        if index_crc != header.index_crc:
            raise CorruptFile("not a sound coded blob: the index's checksum is wrong")
        entries = index.view(ENTRY)
        lengths = entries["length"].astype(np.uint64)
        places = np.uint64(header.index_end) + np.cumsum(lengths) - lengths
        if not np.array_equal(entries["offset"], places) or header.index_end + int(lengths.sum()) != size:
            raise CorruptFile("not a sound coded blob: its chunks do not follow each other to its end")
        self.head_crc = joined(coder.crc32c(head), index_crc, index.size)
        return header, entries

    def parts(self, start: int, stop: int, piece_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """(first element, last + 1, first chunk, last + 1) of the pieces that make up elements [start, stop): whole
        chunks of about ``piece_bytes`` decoded bytes, cut at both ends to what was asked for.
        """
        if start >= stop:
            return
        last = len(self.entries) - 1
        step = max(1, piece_bytes // (self.width << self.log2))
        first, end = min(start >> self.log2, last), min((stop - 1) >> self.log2, last) + 1
        for chunk in range(first, end, step):
            until = min(chunk + step, end)
            beyond = self.count if until > last else until << self.log2
            yield max(start, chunk << self.log2), min(stop, beyond), chunk, until

    def load(self, first: int, until: int, room: Room = _new) -> tuple[np.ndarray, int]:
        """Chunks [first, until) as a blob of their own, and the bytes of its header and index. ``room(size)`` gives the
        bytes to hold it.
        """
        chosen = self.entries[first:until]
        beyond = self.count if until == len(self.entries) else until << self.log2
        head = render(self.header, (beyond - (first << self.log2),), chosen)
        size = int(chosen["length"].sum(dtype=np.uint64))
        blob = room(len(head) + size)
        blob[: len(head)] = np.frombuffer(head, np.uint8)
        read_at(self.file, self.start + int(chosen["offset"][0]), size, blob[len(head) :])
        return blob, len(head)

    def decode(
        self, start: int, stop: int, first: int, until: int, out: np.ndarray, room: Room = _new
    ) -> None:
        """Elements [start, stop), which chunks [first, until) hold, as bytes into ``out``."""
        blob, base = self.load(first, until, room)[0], first << self.log2
        coder.decode(blob, start - base, stop - base, out)


class BlobWriter:
    """A blob of ``shape`` written at ``start`` of an open file from blobs of its pieces, in order.

    Each piece but the last has a multiple of 2^20 elements and the last more than 2^19, unless it is the only one: so
    chunks of any size end where they do in the whole.
    """

    def __init__(self, file: BinaryIO, start: int, shape: tuple[int, ...]):
        self.file, self.start, self.shape = file, start, shape
        self.header: BlobHeader | None = None
        self.entries: list[np.ndarray] = []
        self.size = self.crc = 0  # of the chunks so far

    def add(self, blob: np.ndarray) -> None:
        """The next piece."""
        header, entries, chunks = split(blob)
        if self.header is None:
            self.header = replace(header, shape=self.shape)
            self.file.seek(self.start + self.header.index_end)
        self.entries.append(entries)
        self.crc = joined(self.crc, coder.crc32c(chunks), chunks.size)
        self.size += chunks.size
        self.file.write(chunks)
        hurry(self.file)

    def finish(self) -> tuple[int, int]:
        """Writes header and index; (bytes of the whole blob, their crc32c)."""
        head = render(self.header, self.shape, np.concatenate(self.entries))
        self.file.seek(self.start)
        self.file.write(head)
        return len(head) + self.size, joined(coder.crc32c(head), self.crc, self.size)


def cuts(count: int, step: int) -> list[tuple[int, int]]:
    """[0, count) in pieces of ``step`` elements, a multiple of 2^20, and what BlobWriter asks of the last."""
    pieces = max(1, count // step + (count % step > 1 << 19))
    return [(i * step, count if i + 1 == pieces else (i + 1) * step) for i in range(pieces)]
