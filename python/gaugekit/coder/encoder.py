"""Bytes to a coded blob in NumPy, as csrc/cpu/rans_encoder.h does it."""

from __future__ import annotations

import itertools

import numpy as np

from gaugekit.coder.composition import (
    BATCH_SYMBOLS,
    BLOCK_GROUPS,
    LANE_ELEMENT,
    LANES,
    LOWER,
    WIDTHS,
    chunk_starts,
)
from gaugekit.coder.crc32c import crc32c
from gaugekit.coder.header import ENTRY, BlobHeader, padded
from gaugekit.coder.tables import SLOTS, frequencies, pack_six, slots_by_symbol, table_shift, to_planes


def _by_lane(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 vectors -> (uint8 [groups, chunks, 64] in lane order, bool mask of what is not filled up)."""
    groups = max(-(-row.size // LANES) for row in rows)
    values, live = np.zeros((2, len(rows), groups * LANES), np.uint8)
    for value, mask, row in zip(values, live, rows, strict=True):
        value[: row.size], mask[: row.size] = row, 1
    values, live = (
        array.reshape(len(rows), groups, LANES)[:, :, LANE_ELEMENT].transpose(1, 0, 2)
        for array in (values, live)
    )
    return np.ascontiguousarray(values), live.astype(bool)


def _code_symbols(symbols: list[np.ndarray], tables: list) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """For each chunk its 64 states and the words of its two segments."""
    chunks = len(symbols)
    index, live = _by_lane(symbols)
    groups, partial = len(index), ~live.all((1, 2))
    frequency = np.ones((chunks, 256), np.uint64)
    start = np.zeros((chunks, 256), np.uint64)
    slots = np.zeros((chunks, SLOTS), np.uint64)
    for c, (names, f, order) in enumerate(tables):
        frequency[c, names], start[c, names], slots[c] = f, np.cumsum(f) - f + c * SLOTS, order
    frequency, start, slots = frequency.reshape(-1), start.reshape(-1), slots.reshape(-1)
    # x < 2^19 * frequency divides through this reciprocal exactly: the product's error is below 1 / frequency.
    reciprocal = ((np.uint64(1) << np.uint64(43)) + frequency - np.uint64(1)) // frequency
    limit = frequency << np.uint64(19)
    row = (np.arange(chunks, dtype=np.int64) * 256)[:, None]
    by_12, by_16, by_43 = (np.uint64(bits) for bits in (12, 16, 43))
    x = np.full((chunks, LANES), LOWER, np.uint64)
    spilled = np.zeros((groups, chunks, LANES), bool)
    states = np.zeros((groups, chunks, LANES), np.uint32)
    for end in range(groups, 0, -BLOCK_GROUPS):
        first = max(0, end - BLOCK_GROUPS)
        key = index[first:end] + row
        limits, reciprocals, divisors, starts = (t[key] for t in (limit, reciprocal, frequency, start))
        for g in range(end - 1, first - 1, -1):
            before, i = x, g - first
            states[g] = x
            spill = np.greater_equal(x, limits[i], out=spilled[g])
            x = np.where(spill, x >> by_16, x)
            quotient = x * reciprocals[i] >> by_43
            x -= quotient * divisors[i]
            x += starts[i]
            x = quotient << by_12 | slots[x.view(np.int64)]
            if partial[g]:
                x = np.where(live[g], x, before)
                spill &= live[g]
    words = states.astype("<u2")
    halves = (slice(0, 32), slice(32, 64))
    return [(x[c].astype("<u4"), [words[:, c, h][spilled[:, c, h]] for h in halves]) for c in range(chunks)]


def _section(array: np.ndarray) -> np.ndarray:
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return np.concatenate([raw, np.zeros(-raw.size % 16, np.uint8)])


def _encode_chunks(pieces: list[np.ndarray], width: int, kind: int) -> list[tuple[np.ndarray, np.ndarray]]:
    shifts = [table_shift(piece) if kind == 2 else 0 for piece in pieces]
    kinds = [kind if shift >= 0 else 0 for shift in shifts]
    planes = [to_planes(*piece) for piece in zip(pieces, itertools.repeat(width), kinds, shifts)]
    tables = []
    for p in planes:
        counts = np.bincount(p[-1], minlength=256)
        names = np.flatnonzero(counts)
        f = frequencies(counts[names])
        tables.append((names, f, slots_by_symbol(f)[1]))
    result = []
    coded = _code_symbols([p[-1] for p in planes], tables)
    for piece, p, (names, f, _), (states, words), own, shift in zip(
        pieces, planes, tables, coded, kinds, shifts, strict=True
    ):
        entry = np.zeros((), ENTRY)
        symbols = np.where(names < 4, names, names + max(shift, 0))
        sections = [_section(states), _section(np.stack([symbols, f], 1).astype("<u2"))]
        sections += map(_section, words)
        for plane in range(width - 2, -1, -1):
            constant = bool((p[plane] == p[plane, 0]).all())
            entry["constant"] |= constant << plane
            values = pack_six(p[plane]) if own == 2 and not constant else p[plane]
            sections.append(_section(values[:1] if constant else values))
        body = np.concatenate(sections)
        if body.size >= padded(piece.size):
            body, entry["constant"] = _section(piece), 0
        else:
            method = 1 if own == kind else 2
            entry["symbols"], entry["method"], entry["words"] = f.size, method, [w.size for w in words]
        entry["length"], entry["crc_coded"], entry["crc_decoded"] = body.size, crc32c(body), crc32c(piece)
        result.append((body, entry))
    return result


def encode(data: np.ndarray, shape: tuple[int, ...], element: int, kind: int, chunk_log2: int) -> np.ndarray:
    """The coded blob, uint8 [bytes], of ``data``, uint8 [count * width]."""
    width = WIDTHS[element]
    starts = chunk_starts(data.size // width, chunk_log2)
    pieces = [data[a * width : b * width] for a, b in itertools.pairwise(starts)]
    bodies, entries = [], np.zeros(len(pieces), ENTRY)
    offset = BlobHeader(element, kind, chunk_log2, shape, 0, 0).index_end
    batch = max(1, BATCH_SYMBOLS >> chunk_log2)
    for first in range(0, len(pieces), batch):
        for i, (body, entry) in enumerate(_encode_chunks(pieces[first : first + batch], width, kind), first):
            entries[i] = entry
            entries[i]["offset"] = offset
            bodies.append(body)
            offset += body.size
    index = entries.view(np.uint8)
    header = BlobHeader(element, kind, chunk_log2, shape, offset, crc32c(index))
    return np.concatenate([np.frombuffer(header.render(), np.uint8), index, *bodies])
