"""The header of a coded blob, read and written: 48 bytes and the shape, before the index of chunks (docs/format.md).

A header of fields is sealed by the crc32c of itself, in which the checksum's own bytes count as zero. Transfer blobs
(``codec/tensors/fixed``) are sealed in the same way.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gaugekit.coder.crc32c import crc32c

CORRUPT = "corrupt blob: "
MAGIC, VERSION, MAX_RANK = b"GKRANS\x1a\n", 1, 64
# magic, version, element, kind, context, tables, log2, rank, elements, bytes, chunks, the index's crc32c, 0, crc32c
FIELDS = struct.Struct("<8sHBBBBBBQQIIII")
ENTRY = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("symbols", "<u2"),
        ("method", "u1"),
        ("constant", "u1"),
        ("words", "<u4", 2),
        ("crc_coded", "<u4"),
        ("crc_decoded", "<u4"),
    ]
)
KINDS_OF = {1: (0, 1, 2), 2: (1,), 3: (0, 1), 4: (1,), 5: (1,), 6: (1,)}


def corrupt(sentence: str) -> RuntimeError:
    """What a damaged blob raises inside the operators."""
    return RuntimeError(CORRUPT + sentence)


def padded(size: int) -> int:
    """``size`` bytes and what fills them up to 16."""
    return (size + 15) & ~15


def chunk_count(count: int, log2: int) -> int:
    """How many chunks of 2^log2 symbols ``count`` elements take; the last takes what is at most half a chunk."""
    return max(1, (count + (1 << log2 - 1) - 1) >> log2) if count else 0


def sealed(fields: struct.Struct, values: Sequence, shape: Sequence[int]) -> bytes:
    """``values`` and then their crc32c as ``fields`` has them, and the shape, filled up to 16 bytes."""
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    dims += bytes(-len(dims) % 16)
    crc = crc32c(np.frombuffer(fields.pack(*values, 0) + dims, np.uint8))
    return fields.pack(*values, crc) + dims


def unsealed(fields: struct.Struct, head: bytes, rank: int) -> tuple[int, ...] | None:
    """The shape behind ``fields`` in ``head``; None where the checksum is wrong."""
    end = fields.size - 4
    body = np.frombuffer(head[:end] + bytes(4) + head[fields.size :], np.uint8)
    if crc32c(body) != int.from_bytes(head[end : fields.size], "little"):
        return None
    return struct.unpack_from(f"<{rank}Q", head, fields.size)


@dataclass(frozen=True)
class BlobHeader:
    """What a blob's header says; ``length`` counts the whole blob's bytes, ``index_crc`` is its index's crc32c."""

    element: int
    kind: int
    chunk_log2: int
    shape: tuple[int, ...]
    length: int
    index_crc: int

    @property
    def count(self) -> int:
        """The elements."""
        return math.prod(self.shape)

    @property
    def chunks(self) -> int:
        return chunk_count(self.count, self.chunk_log2)

    @property
    def index_begin(self) -> int:
        return FIELDS.size + padded(8 * len(self.shape))

    @property
    def index_end(self) -> int:
        """Where the first chunk begins."""
        return self.index_begin + self.chunks * ENTRY.itemsize

    def render(self) -> bytes:
        """The header's bytes, up to the index."""
        first = (MAGIC, VERSION, self.element, self.kind, 0, 1, self.chunk_log2, len(self.shape))
        return sealed(FIELDS, (*first, self.count, self.length, self.chunks, self.index_crc, 0), self.shape)


def header_bytes(start: bytes) -> int:
    """How many bytes the header takes that begins with ``start`` (48 bytes); RuntimeError where that is none."""
    if len(start) < FIELDS.size:
        raise corrupt("it is shorter than a header")
    magic, version, *_, rank = FIELDS.unpack(start)[:8]
    if magic != MAGIC:
        raise corrupt("the magic bytes are not those of a coded blob")
    if version != VERSION:
        raise corrupt("its version is not one this version reads")
    if rank > MAX_RANK:
        raise corrupt(f"it has more than {MAX_RANK} dimensions")
    return FIELDS.size + padded(8 * rank)


def parse(head: bytes, size: int) -> BlobHeader:
    """The header of a blob of ``size`` bytes that begins with ``head``, as long as ``header_bytes`` says.

    RuntimeError that begins with CORRUPT where it contradicts itself or the size.
    """
    if len(head) < header_bytes(head[: FIELDS.size]):
        raise corrupt("it ends within its shape")
    _, _, element, kind, context, tables, log2, rank, count, length, chunks, index_crc, reserved, _ = (
        FIELDS.unpack(head[: FIELDS.size])
    )
    shape = unsealed(FIELDS, head, rank)
    if shape is None:
        raise corrupt("the header's checksum is wrong")
    known = (
        kind in KINDS_OF.get(element, ()) and (context, tables, reserved) == (0, 1, 0) and 14 <= log2 <= 20
    )
    if not known:
        raise corrupt(
            "its element, kind of symbols, context model, tables or chunk size is not one this version reads"
        )
    if any(dim >> 63 for dim in shape) or math.prod(shape) != count or count >> 60:
        raise corrupt("the shape does not multiply to the count")
    if length != size:
        raise corrupt("its length is not the one it names")
    header = BlobHeader(element, kind, log2, shape, length, index_crc)
    if chunks != header.chunks:
        raise corrupt("the number of chunks does not follow from the count")
    if header.index_end > size:
        raise corrupt("it ends within its index")
    return header


def header_of(blob: np.ndarray) -> BlobHeader:
    """``parse`` of the header at the start of ``blob``, uint8 [bytes]."""
    start = blob[: FIELDS.size].tobytes()
    return parse(blob[: header_bytes(start)].tobytes(), blob.size)
