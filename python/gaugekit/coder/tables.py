"""A chunk's elements as byte planes, and its table: frequencies from counts, slots from frequencies
(docs/format.md).
"""

from __future__ import annotations

import numpy as np

SLOTS = 4096


def _masks(width: int) -> tuple:
    """1, 8, and the sign, exponent and mantissa bits of bf16 or fp32, as unsigned integers of ``width``
    bytes.
    """
    mantissa = (1 << (8 * width - 9)) - 1
    sign = 1 << (8 * width - 1)
    return tuple(map(np.dtype(f"<u{width}").type, (1, 8, sign, sign - 1 - mantissa, mantissa)))


def table_shift(data: np.ndarray) -> int:
    """What kind 2 takes from a chunk's symbols of 4 and above so that they are bytes; -1 if that cannot be."""
    exponents = np.unique(data.view("<u2") >> np.uint16(7) & np.uint16(255)).astype(int)
    exponents = exponents[exponents > 0]
    if not exponents.size:
        return 0
    return 4 * int(exponents[0]) - 4 if exponents[-1] - exponents[0] < 63 else -1


def pack_six(values: np.ndarray) -> np.ndarray:
    """uint8 [n], six bits each -> uint8 [48 for each 64 or part of it]."""
    v = np.zeros((-(-values.size // 64), 64), np.uint8)
    v.reshape(-1)[: values.size] = values
    last = v[:, None, 48:] >> np.array([0, 2, 4], np.uint8)[:, None] & np.uint8(3)
    return (v[:, :48] | last.reshape(-1, 48) << np.uint8(6)).reshape(-1)


def unpack_six(packed: np.ndarray, n: int) -> np.ndarray:
    b = packed.reshape(-1, 3, 16)
    last = (b >> np.uint8(6) << np.array([0, 2, 4], np.uint8)[:, None]).sum(1, dtype=np.uint8)
    return np.concatenate([(b & np.uint8(63)).reshape(-1, 48), last], 1).reshape(-1)[:n]


def to_planes(data: np.ndarray, width: int, kind: int, shift: int) -> np.ndarray:
    """uint8 [width, n]: the symbols last (with kind 2 as bytes), the raw planes before them."""
    x = data.view(f"<u{width}")
    if kind == 2:
        symbol = x >> np.uint16(5) & np.uint16(1023)
        symbol = np.where(symbol < 4, symbol, symbol - np.uint16(shift))
        return np.stack([x >> np.uint16(10) & np.uint16(32) | x & np.uint16(31), symbol]).astype(np.uint8)
    if kind == 0:
        one, eight, sign, exponent, mantissa = _masks(width)
        x = (x & exponent) << one | (x & sign) >> eight | x & mantissa
    return np.ascontiguousarray(x.view(np.uint8).reshape(-1, width).T)


def from_planes(planes: np.ndarray, width: int, kind: int, shift: int) -> np.ndarray:
    if kind == 2:
        six, symbol = planes.astype(np.uint16)
        symbol = np.where(symbol < 4, symbol, symbol + np.uint16(shift))
        sign = (six & np.uint16(32)) << np.uint16(10)
        return (sign | symbol << np.uint16(5) | six & np.uint16(31)).astype("<u2").view(np.uint8)
    y = np.ascontiguousarray(planes.T).reshape(-1).view(f"<u{width}")
    if kind == 0:
        one, eight, sign, exponent, mantissa = _masks(width)
        y = y << eight & sign | y >> one & exponent | y & mantissa
    return y.view(np.uint8)


def frequencies(counts: np.ndarray) -> np.ndarray:
    f = np.maximum(1, counts * SLOTS // counts.sum())
    while f.sum() > SLOTS:
        best = -1
        for i in range(f.size):
            if f[i] > 1 and (best < 0 or counts[i] * (2 * f[best] - 1) < counts[best] * (2 * f[i] - 1)):
                best = i
        f[best] -= 1
    while f.sum() < SLOTS:
        best = 0
        for i in range(1, f.size):
            if counts[i] * (2 * f[best] + 1) > counts[best] * (2 * f[i] + 1):
                best = i
        f[best] += 1
    return f


def _owners(f: np.ndarray) -> np.ndarray:
    buckets = max(32, 1 << (f.size - 1).bit_length())
    width = SLOTS // buckets
    rest = f.tolist() + [0] * (buckets - f.size)
    divider, alias = [width] * buckets, list(range(buckets))
    small = [b for b in range(buckets) if rest[b] < width]
    large = [b for b in range(buckets) if rest[b] > width]
    while small:
        s, donor = small.pop(), large[-1]
        divider[s], alias[s] = rest[s], donor
        rest[donor] -= width - rest[s]
        if rest[donor] <= width:
            large.pop()
        if rest[donor] < width:
            small.append(donor)
    inside = np.arange(width) < np.array(divider)[:, None]
    return np.where(inside, np.arange(buckets)[:, None], np.array(alias)[:, None]).reshape(-1)


def slots_by_symbol(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(owners, slots sorted by owner, ascending within one)."""
    owners = _owners(f)
    return owners, np.argsort(owners, kind="stable")
