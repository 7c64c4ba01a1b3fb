"""The section of a packed file of version 2 that says what its tensors are (docs/format.md): the original's header and
how each tensor is stored, compressed together.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from gaugekit.coder.blob import CorruptFile

START = 512  # where the tensors' bytes begin
TENSORS, HEADER = (
    "gaugekit.tensors",
    "gaugekit.header",
)  # the names under which the file lists its two sections
METHODS = ("raw", "zlib")
# A section takes at most this many times its stored bytes in memory: a writer stores what would take more as it is.
MAX_RATIO = 32
ROW_BYTES = 17  # a tensor's number, codec, stored bytes and checksum
LEAST_ENTRY_BYTES = (
    40  # of a header for one tensor: `"":{"dtype":"","shape":[],"data_offsets":[0,0]}` is longer
)


@dataclass(frozen=True)
class Section:
    """The original header's bytes, and for each tensor in the order in which it is stored: its number in the order of
    the original's bytes, whether it is coded, its stored bytes (of raw ones 0: the header says them), and the crc32c of
    those.
    """

    header: bytes
    order: np.ndarray
    coded: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray


def render(section: Section) -> tuple[str, bytes]:
    """(method, bytes) of a section: the shorter method that a reader accepts."""
    plain = b"".join(
        (
            section.header,
            section.order.astype("<u4").tobytes(),
            section.coded.astype("u1").tobytes(),
            section.sizes[section.coded].astype("<u8").tobytes(),
            section.crcs.astype("<u4").tobytes(),
        )
    )
    small = zlib.compress(plain)
    if len(small) < len(plain) <= MAX_RATIO * len(small):
        return "zlib", small
    return "raw", plain


def parse(method: str, data: bytes, header_bytes: int, tensors: int) -> Section:
    """The section in ``data``; CorruptFile unless it is one of ``header_bytes`` and ``tensors``."""
    most = header_bytes + ROW_BYTES * tensors
    if tensors * LEAST_ENTRY_BYTES > header_bytes:
        raise CorruptFile("its header is too short for its tensors")
    plain = data if method == "raw" else _inflated(data, most)
    fixed = header_bytes + 4 * tensors
    coded = np.frombuffer(plain[fixed : fixed + tensors], "u1")
    if coded.size != tensors or coded.max(initial=0) > 1:
        raise CorruptFile("the section of the header does not say how its tensors are stored")
    coded = coded.astype(bool)
    count = int(coded.sum())
    if len(plain) != fixed + tensors + 8 * count + 4 * tensors:
        raise CorruptFile("the section of the header has not the size that its tensors take")
    order = np.frombuffer(plain, "<u4", tensors, header_bytes)
    if not np.array_equal(np.sort(order), np.arange(tensors)):
        raise CorruptFile("the section of the header does not name each tensor once")
    sizes = np.zeros(tensors, "<u8")
    sizes[coded] = np.frombuffer(plain, "<u8", count, fixed + tensors)
    crcs = np.frombuffer(plain, "<u4", tensors, fixed + tensors + 8 * count)
    return Section(plain[:header_bytes], order, coded, sizes, crcs)


def _inflated(data: bytes, most: int) -> bytes:
    """What a zlib stream holds; CorruptFile where that is more than ``most`` bytes or than its size justifies."""
    limit = min(most, MAX_RATIO * len(data))
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise CorruptFile(f"the section of the header does not decompress: {error}") from None
    if len(plain) > limit or not stream.eof or stream.unused_data:
        raise CorruptFile("the section of the header is not one sound zlib stream of the size it should have")
    return plain
