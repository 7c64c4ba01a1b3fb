"""A coded blob in pieces: a file's blob decoded, and made, without ever holding the whole of it.

The chunks of a blob stand by themselves (docs/format.md), so some of them, behind a header and an index of their own,
are a blob of that part of the tensor. Taking a blob apart and putting one together is the same step both ways.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import torch

from gaugekit.codec.tensors.blob import as_byte_tensor
from gaugekit.files.places import naming_file
from gaugekit.ops.rans import operator as rans
from gaugekit.ops.rans.crc32c import joined
from gaugekit.ops.rans.operator import CorruptFile

MAGIC, VERSION = b"GKRANS\x1a\n", 1
FIELDS = struct.Struct(
    "<8sHBBBBBBQQIIII"
)  # magic, version, element, symbols, context, tables, log2, rank, ...
MAX_RANK = 64
ENTRY = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("symbols", "<u2"), ("method", "u1"), ("constant", "u1")]
    + [(name, "<u4") for name in ("words_0", "words_1", "coded_crc", "decoded_crc")]
)


Room = Callable[[int], np.ndarray]


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


def chunk_count(count: int, log2: int) -> int:
    """How many chunks of 2^log2 symbols ``count`` elements take."""
    return max(1, (count + (1 << log2 - 1) - 1) >> log2) if count else 0


def render(like: bytes, shape: tuple[int, ...], entries: np.ndarray) -> bytes:
    """Header, shape and index of a blob of ``shape`` with these chunks, of the type and symbols of the header
    ``like``.

    Offsets are made anew: the first chunk follows the index, each other one the one before it.
    """
    begin = len(like[:48]) + 16 * -(-8 * len(shape) // 16)
    entries = entries.copy()
    lengths = entries["length"].astype(np.uint64)
    start = begin + entries.nbytes
    entries["offset"] = start + np.cumsum(lengths) - lengths
    index = entries.tobytes()
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    dims += bytes(begin - 48 - len(dims))
    fields = list(FIELDS.unpack(like[:48]))
    fields[7:] = [len(shape), torch.Size(shape).numel(), start + int(lengths.sum()), len(entries)]
    fields += [rans.crc32c(as_byte_tensor(index)), 0, 0]
    crc = rans.crc32c(as_byte_tensor(FIELDS.pack(*fields) + dims))
    return FIELDS.pack(*fields[:-1], crc) + dims + index


def split(blob: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray]:
    """The header, the index and the chunks of a blob that was just made."""
    header = blob[:48].tobytes()
    begin = 48 + 16 * -(-8 * header[15] // 16)
    chunks = FIELDS.unpack(header)[10]
    end = begin + chunks * ENTRY.itemsize
    return header, np.frombuffer(blob[begin:end].tobytes(), ENTRY), blob[end:]


class StoredBlob:
    """The blob at [start, start + size) of an open file, its header and index read and checked; decoded by parts.

    ``dtype`` and ``shape`` are what the file's header says of it. CorruptFile where the blob does not agree.
    """

    def __init__(self, file: BinaryIO, start: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]):
        self.file, self.start, self.dtype, self.shape = file, start, dtype, shape
        self.count = torch.Size(shape).numel()
        self.header, self.entries = self._opened(size)
        self.log2 = self.header[14]

    def _opened(self, size: int) -> tuple[bytes, np.ndarray]:
        header = read_at(self.file, self.start, min(size, 48)).tobytes()
        if size < 48 or header[:8] != MAGIC:
            raise CorruptFile("not a sound coded blob: the magic bytes are not those of a coded blob")
        _, version, element, _, _, _, log2, rank, count, length, chunks, crc, reserved, sealed = (
            FIELDS.unpack(header)
        )
        if version != VERSION or reserved or rank > MAX_RANK or not 14 <= log2 <= 20:
            raise CorruptFile("not a sound coded blob: its version or sizes are not those this version reads")
        begin = 48 + 16 * -(-8 * rank // 16)
        end = begin + chunks * ENTRY.itemsize
        if length != size or end > size:
            raise CorruptFile("not a sound coded blob: its length or its index does not fit the file")
        dims = read_at(self.file, self.start + 48, begin - 48).tobytes()
        if rans.crc32c(as_byte_tensor(header[:44] + bytes(4) + dims)) != sealed:
            raise CorruptFile("not a sound coded blob: the header's checksum is wrong")
        found = struct.unpack(f"<{rank}Q", dims[: 8 * rank])
        if rans.DTYPES.get(element) != self.dtype or found != tuple(self.shape) or count != self.count:
            raise CorruptFile(
                f"the header says {self.dtype} {list(self.shape)}, its blob {rans.DTYPES.get(element)} {list(found)}"
            )
        index = read_at(self.file, self.start + begin, end - begin)
        index_crc = rans.crc32c(torch.from_numpy(index))
        if index_crc != crc:
            raise CorruptFile("not a sound coded blob: the index's checksum is wrong")
        entries = index.view(ENTRY)
        lengths = entries["length"].astype(np.uint64)
        places = np.uint64(end) + np.cumsum(lengths) - lengths
        if (
            chunks != chunk_count(count, log2)
            or not np.array_equal(entries["offset"], places)
            or end + int(lengths.sum()) != size
        ):
            raise CorruptFile("not a sound coded blob: its chunks do not follow each other to its end")
        self.head_crc = joined(rans.crc32c(as_byte_tensor(header + dims)), index_crc, index.size)
        return header, entries

    def parts(self, start: int, stop: int, piece_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """(first element, last + 1, first chunk, last + 1) of the pieces that make up elements [start, stop): whole
        chunks of about ``piece_bytes`` decoded bytes, cut at both ends to what was asked for.
        """
        if start >= stop:
            return
        last = len(self.entries) - 1
        step = max(1, piece_bytes // (self.dtype.itemsize << self.log2))
        first, end = min(start >> self.log2, last), min((stop - 1) >> self.log2, last) + 1
        for chunk in range(first, end, step):
            until = min(chunk + step, end)
            beyond = self.count if until > last else until << self.log2
            yield max(start, chunk << self.log2), min(stop, beyond), chunk, until

    def load(self, first: int, until: int, room: Room = _new) -> tuple[torch.Tensor, int]:
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
        return torch.from_numpy(blob), len(head)

    def decode(
        self, start: int, stop: int, first: int, until: int, out: torch.Tensor, room: Room = _new
    ) -> None:
        """Elements [start, stop), which chunks [first, until) hold, into the flat tensor ``out``."""
        blob, base = self.load(first, until, room)[0], first << self.log2
        rans.open_blob(blob)
        rans.decode(blob, start - base, stop - base, out)


class BlobWriter:
    """A blob of ``shape`` written at ``start`` of an open file from blobs of its pieces, in order.

    Each piece but the last has a multiple of 2^20 elements and the last more than 2^19, unless it is the only one: so
    chunks of any size end where they do in the whole.
    """

    def __init__(self, file: BinaryIO, start: int, shape: tuple[int, ...]):
        self.file, self.start, self.shape = file, start, shape
        self.header, self.entries = b"", []
        self.size = self.crc = 0  # of the chunks so far

    def add(self, blob: np.ndarray) -> None:
        """The next piece."""
        header, entries, chunks = split(blob)
        if not self.header:
            self.header = header
            count = chunk_count(torch.Size(self.shape).numel(), header[14])
            self.file.seek(self.start + 48 + 16 * -(-8 * len(self.shape) // 16) + count * ENTRY.itemsize)
        self.entries.append(entries)
        self.crc = joined(self.crc, rans.crc32c(torch.from_numpy(chunks)), chunks.size)
        self.size += chunks.size
        self.file.write(chunks)

    def finish(self) -> tuple[int, int]:
        """Writes header and index; (bytes of the whole blob, their crc32c)."""
        head = render(self.header, self.shape, np.concatenate(self.entries))
        self.file.seek(self.start)
        self.file.write(head)
        return len(head) + self.size, joined(rans.crc32c(as_byte_tensor(head)), self.crc, self.size)


def cuts(count: int, step: int) -> list[tuple[int, int]]:
    """[0, count) in pieces of ``step`` elements, a multiple of 2^20, and what BlobWriter asks of the last."""
    pieces = max(1, count // step + (count % step > 1 << 19))
    return [(i * step, count if i + 1 == pieces else (i + 1) * step) for i in range(pieces)]
