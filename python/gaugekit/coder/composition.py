"""A coded blob decoded in NumPy, all lanes of many chunks a step at a time.

Answers where there is no binary, also as the composition of ``ops/rans``. Same bytes as csrc/cpu/rans_*.h, which it
follows function by function.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gaugekit.coder.crc32c import crc32c
from gaugekit.coder.header import ENTRY, chunk_count, corrupt, header_of, padded
from gaugekit.coder.tables import SLOTS, from_planes, slots_by_symbol, unpack_six

WIDTHS = {1: 2, 2: 2, 3: 4, 4: 1, 5: 1, 6: 1}
LOWER, UPPER = 1 << 15, 1 << 31
LANES = 64
# The element of a group of 64 that each lane codes: even elements first, then odd ones, in either half.
LANE_ELEMENT = np.array([32 * (lane // 32) + 2 * (lane % 16) + lane % 32 // 16 for lane in range(LANES)])
BLOCK_GROUPS = 64  # groups whose symbols are looked up at once
BATCH_SYMBOLS = 1 << 20  # chunks that run side by side: bounds the memory, keeps NumPy's calls few


def chunk_starts(count: int, log2: int) -> list[int]:
    """Where chunks begin, and the end: 2^log2 symbols each, the last taking what is at most half a chunk."""
    return [i << log2 for i in range(chunk_count(count, log2))] + [count]


@dataclass
class Blob:
    """A blob whose header, index and sizes were checked."""

    data: np.ndarray
    element: int
    kind: int
    chunk_log2: int
    count: int
    shape: tuple[int, ...]
    entries: np.ndarray
    starts: list[int]

    @property
    def width(self) -> int:
        return WIDTHS[self.element]


def open_blob(data: np.ndarray) -> Blob:
    """Checks everything that can be checked before decoding; RuntimeError that begins with CORRUPT."""
    header = header_of(data)
    index = data[header.index_begin : header.index_end]
    if crc32c(index) != header.index_crc:
        raise corrupt("the index's checksum is wrong")
    starts = chunk_starts(header.count, header.chunk_log2)
    kind = (header.element, header.kind, header.chunk_log2, header.count, header.shape)
    blob = Blob(data, *kind, index.copy().view(ENTRY), starts)
    _check_entries(blob, header.index_end)
    return blob


def _chunk_kind(blob: Blob, entry) -> int:
    return 0 if entry["method"] == 2 else blob.kind


def _plane_bytes(n: int, kind: int) -> int:
    return (n + 63) // 64 * 48 if kind == 2 else n


def _check_entries(blob: Blob, cursor: int) -> None:
    width = blob.width
    for e, a, b in zip(blob.entries, blob.starts[:-1], blob.starts[1:], strict=True):
        n, groups, rest = b - a, (b - a) // 64, (b - a) % 64
        words, symbols, constant = e["words"].tolist(), int(e["symbols"]), int(e["constant"])
        if int(e["offset"]) != cursor:
            raise corrupt("a chunk does not start where the one before it ends")
        if e["method"] == 0:
            if symbols or constant or any(words):
                raise corrupt("a raw chunk has fields of a coded one")
            length = padded(n * width)
        elif e["method"] == 1 or (e["method"] == 2 and blob.kind == 2):
            if not 1 <= symbols <= 256 or constant >> (width - 1):
                raise corrupt("a chunk's symbols or constant planes are out of range")
            if words[0] > 32 * groups + min(rest, 32) or words[1] > 32 * groups + max(rest - 32, 0):
                raise corrupt("a segment has more words than symbols")
            length = 256 + padded(4 * symbols) + padded(2 * words[0]) + padded(2 * words[1])
            size = _plane_bytes(n, _chunk_kind(blob, e))
            length += sum(padded(1 if constant >> plane & 1 else size) for plane in range(width - 1))
        else:
            raise corrupt("a chunk's method is not one this version reads")
        if int(e["length"]) != length or length > blob.data.size - cursor:
            raise corrupt("a chunk's length is not the sum of its sections, or runs past the end")
        cursor += length
    if cursor != blob.data.size:
        raise corrupt("bytes follow the last chunk")


def _read_chunk(blob: Blob, i: int) -> tuple:
    """(states, names, frequencies, words of both segments, shift, planes) of a coded chunk, its table and states
    checked.
    """
    e, place = blob.entries[i], int(blob.entries[i]["offset"])
    n = blob.starts[i + 1] - blob.starts[i]

    def section(size: int) -> np.ndarray:
        nonlocal place
        start, place = place, place + padded(size)
        return blob.data[start : start + size]

    states = section(256).copy().view("<u4").astype(np.int64)
    if (states < LOWER).any() or (states >= UPPER).any():
        raise corrupt("a state is not in [2^15, 2^31)")
    names, f = section(4 * int(e["symbols"])).copy().view("<u2").astype(np.int64).reshape(-1, 2).T
    kind, shift = _chunk_kind(blob, e), 0
    if not names.size:
        raise corrupt("a table has no symbols")
    if names[-1] > (1023 if kind == 2 else 255) or (np.diff(names) <= 0).any():
        raise corrupt("a table's symbols are not ascending, or too large")
    if kind == 2 and names[-1] >= 4:
        shift = int(names[names >= 4][0]) // 4 * 4 - 4
        names = np.where(names < 4, names, names - shift)
        if names[-1] > 255:
            raise corrupt("a table's exponents are too far apart")
    if (f < 1).any() or (f > SLOTS).any() or f.sum() != SLOTS:
        raise corrupt("a table's frequencies are not in 1..4096 or do not sum to 4096")
    words = [section(2 * w).copy().view("<u2") for w in e["words"].tolist()]
    planes = np.empty((blob.width, n), np.uint8)
    for plane in range(blob.width - 2, -1, -1):
        constant = bool(int(e["constant"]) >> plane & 1)
        values = section(1 if constant else _plane_bytes(n, kind))
        if constant and kind == 2 and values[0] > 63:
            raise corrupt("a constant of six bits has more")
        planes[plane] = unpack_six(values, n) if kind == 2 and not constant else values
    return states, names, f, words, shift, planes


def _decode_symbols(chunks: list[tuple]) -> None:
    """Fills the last plane of every chunk of ``_read_chunk``."""
    sizes = np.array([planes.shape[1] for *_, planes in chunks])
    count, groups = sizes.size, -(-int(sizes.max()) // LANES)
    step, symbol = np.empty((count, SLOTS), np.int64), np.empty((count, SLOTS), np.uint8)
    for c, (_, names, f, *_) in enumerate(chunks):
        owners, order = slots_by_symbol(f)
        symbol[c], step[c] = names[owners], f[owners] << 12
        step[c, order] += np.arange(SLOTS) - np.repeat(np.cumsum(f) - f, f)  # the slot's rank
    step, symbol = step.reshape(-1), symbol.reshape(-1)
    streams = [words for chunk in chunks for words in chunk[3]]
    ends = np.cumsum([words.size for words in streams])
    next_word = ends - [words.size for words in streams]
    stream = np.concatenate([*streams, np.zeros(1, np.uint16)])
    base = (np.arange(count) * SLOTS)[:, None]
    x = np.stack([c[0] for c in chunks])
    decoded = np.empty((count, groups, LANES), np.uint8)
    keys = np.empty((min(groups, BLOCK_GROUPS), count, LANES), np.int64)
    for g in range(groups):
        key = np.add(x & (SLOTS - 1), base, out=keys[g % BLOCK_GROUPS])
        both = step[key]
        stepped = (both >> 12) * (x >> 12) + (both & 4095)
        refill = stepped < LOWER
        if (sizes < (g + 1) * LANES).any():
            live = g * LANES + LANE_ELEMENT < sizes[:, None]
            stepped = np.where(live, stepped, x)
            refill &= live
        x = stepped
        lanes = np.flatnonzero(refill)
        segment = lanes >> 5
        taken = np.bincount(segment, minlength=next_word.size)
        place = np.arange(lanes.size) + (next_word - np.cumsum(taken) + taken)[segment]
        flat = x.reshape(-1)
        flat[lanes] = flat[lanes] << 16 | stream.take(place, mode="clip")
        next_word = next_word + taken
        if (g + 1) % BLOCK_GROUPS == 0 or g + 1 == groups:
            first = g // BLOCK_GROUPS * BLOCK_GROUPS
            done = symbol[keys[: g + 1 - first]].transpose(1, 0, 2)
            decoded[:, first : g + 1, LANE_ELEMENT] = done
    if (next_word != ends).any() or (x != LOWER).any():
        raise corrupt(
            "a segment does not end in the state it began with, or its words do not last or are left"
        )
    for c, (*_, planes) in enumerate(chunks):
        planes[-1] = decoded[c].reshape(-1)[: planes.shape[1]]


def decode_whole(blob: Blob, i: int) -> np.ndarray:
    """The uint8 elements of one coded chunk; RuntimeError that begins with CORRUPT."""
    chunk = _read_chunk(blob, i)
    _decode_symbols([chunk])
    *_, shift, planes = chunk
    return from_planes(planes, blob.width, _chunk_kind(blob, blob.entries[i]), shift)


def decode(data: np.ndarray, start: int, stop: int, out: np.ndarray) -> None:
    """Elements [start, stop) into ``out``, uint8 [(stop - start) * width]; RuntimeError that begins with
    CORRUPT.
    """
    blob = open_blob(data)
    if not 0 <= start <= stop <= blob.count or out.size != (stop - start) * blob.width:
        raise RuntimeError("start, stop, out: not a range of the blob")
    needed = [i for i in range(len(blob.entries)) if blob.starts[i] < stop and start < blob.starts[i + 1]]
    batch = max(1, BATCH_SYMBOLS >> blob.chunk_log2)
    width = blob.width
    for first in range(0, len(needed), batch):
        group = needed[first : first + batch]
        coded = {i: _read_chunk(blob, i) for i in group if blob.entries[i]["method"]}
        if coded:
            _decode_symbols(list(coded.values()))
        for i in group:
            a, b = blob.starts[i], blob.starts[i + 1]
            offset = int(blob.entries[i]["offset"])
            piece = blob.data[offset : offset + (b - a) * width]
            if i in coded:
                *_, shift, planes = coded[i]
                piece = from_planes(planes, width, _chunk_kind(blob, blob.entries[i]), shift)
            if crc32c(piece) != int(blob.entries[i]["crc_decoded"]):
                raise corrupt("a chunk's checksum is wrong")
            low, high = max(a, start), min(b, stop)
            out[(low - start) * width : (high - start) * width] = piece[
                (low - a) * width : (high - a) * width
            ]
