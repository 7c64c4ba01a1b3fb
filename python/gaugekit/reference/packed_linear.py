"""y = x Wᵀ + b with W in the layout of docs/resident.md: packing, unpacking and the product, weight by weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK, SEGMENT = 64, 1024
# dtype: (exponent's first bit, largest exponent, bits of the raw byte as (bit of the weight, bit of the byte), planes
# after the code's)
FIELDS = {
    torch.bfloat16: (7, 255, [(i, i) for i in range(7)] + [(15, 7)], []),
    torch.float16: (10, 31, [(i, i) for i in range(8)], [8, 9, 15]),
    torch.float8_e5m2: (2, 31, [], [0, 1, 7]),
}


def pack(weight: Tensor, code_bits: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(raw, planes, escapes, offsets, window) of a bf16, fp16 or float8_e5m2 matrix; ``code_bits`` 3, 4 or None: the
    smaller."""
    first, largest, byte, further = FIELDS[weight.dtype]
    unsigned = torch.uint8 if weight.dtype == torch.float8_e5m2 else torch.uint16
    bits = weight.contiguous().view(unsigned).numpy().astype(np.int64)
    rows, columns = bits.shape
    exponents = bits >> first & largest
    blocks = -(-columns // BLOCK)
    if code_bits is None:
        cost = {
            c: c * BLOCK * blocks * rows + 8 * sum(outside(e, c, largest)[1] for e in exponents)
            for c in (3, 4)
        }
        code_bits = min((3, 4), key=lambda c: cost[c])
    last = 2**code_bits - 1
    raw = np.zeros((rows, blocks * BLOCK if byte else 0), np.uint8)
    planes = np.zeros((rows, code_bits + len(further), blocks), np.uint64)
    escapes, offsets, window = [], [], []
    for n in range(rows):
        base, _ = outside(exponents[n], code_bits, largest)
        window.append(base)
        for k in range(columns):
            if k % SEGMENT == 0:
                offsets.append(len(escapes))
            word, code = int(bits[n, k]), int(exponents[n, k]) - base
            if not 0 <= code < last:
                escapes.append(int(exponents[n, k]) ^ (base + last))
                code = last
            if byte:
                raw[n, k] = sum((word >> i & 1) << j for i, j in byte)
            for p, bit in enumerate(
                [code >> p & 1 for p in range(code_bits)] + [word >> i & 1 for i in further]
            ):
                planes[n, p, k // BLOCK] |= np.uint64(bit << k % BLOCK)
    offsets.append(len(escapes))
    return (
        torch.from_numpy(raw),
        torch.from_numpy(planes.view(np.int64)),
        torch.tensor(escapes, dtype=torch.uint8),
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(window, dtype=torch.uint8),
    )


def outside(exponents: np.ndarray, code_bits: int, largest: int) -> tuple[int, int]:
    """(the smallest first exponent whose window leaves the fewest of these outside, how many it leaves)."""
    last = 2**code_bits - 1
    counts = np.bincount(exponents, minlength=largest + 1)
    inside = [counts[base : base + last].sum() for base in range(largest + 1 - last)]
    return int(np.argmax(inside)), int(len(exponents) - max(inside))


def unpack(
    raw: Tensor, planes: Tensor, escapes: Tensor, offsets: Tensor, window: Tensor, columns: int
) -> Tensor:
    """The matrix [N, columns], bfloat16 (3 or 4 planes), float16 (6 or 7) or, without raw bytes, float8_e5m2."""
    halves = torch.float16 if raw.shape[1] or not columns else torch.float8_e5m2
    dtype = torch.bfloat16 if planes.shape[1] <= 4 else halves
    first, _, byte, further = FIELDS[dtype]
    code_bits = planes.shape[1] - len(further)
    words = np.zeros((raw.shape[0], columns), np.uint16)
    segments = -(-columns // SEGMENT)
    plane_bits = planes.numpy().view(np.uint64)
    for n in range(raw.shape[0]):
        for k in range(columns):
            if k % SEGMENT == 0:
                count = int(offsets[n * segments + k // SEGMENT])
            bit = [int(plane_bits[n, p, k // BLOCK]) >> k % BLOCK & 1 for p in range(planes.shape[1])]
            code = sum(bit[p] << p for p in range(code_bits))
            exponent = int(window[n]) + code
            if code == 2**code_bits - 1:
                exponent ^= int(escapes[count])
                count += 1
            word = exponent << first | sum((int(raw[n, k]) >> j & 1) << i for i, j in byte)
            words[n, k] = word | sum(bit[code_bits + p] << i for p, i in enumerate(further))
    if dtype == torch.float8_e5m2:
        words = words.astype(np.uint8)
    return torch.from_numpy(words).view(dtype)


def packed_linear(
    x: Tensor,
    raw: Tensor,
    planes: Tensor,
    escapes: Tensor,
    offsets: Tensor,
    window: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b in float64: x [..., K], b [N] or None -> [..., N]."""
    weight = unpack(raw, planes, escapes, offsets, window, x.shape[-1]).double()
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()
