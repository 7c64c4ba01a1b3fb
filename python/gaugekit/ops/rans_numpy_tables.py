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


def to_planes(data: np.ndarray, width: int, model: int) -> np.ndarray:
    """uint8 [width, n]: the symbols last, the raw planes before them."""
    x = data.view(f"<u{width}")
    if model == 0:
        one, eight, sign, exponent, mantissa = _masks(width)
        x = (x & exponent) << one | (x & sign) >> eight | x & mantissa
    return np.ascontiguousarray(x.view(np.uint8).reshape(-1, width).T)


def from_planes(planes: np.ndarray, width: int, model: int) -> np.ndarray:
    y = np.ascontiguousarray(planes.T).reshape(-1).view(f"<u{width}")
    if model == 0:
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
