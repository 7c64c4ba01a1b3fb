"""y = x Wᵀ + b with W in the layout of docs/resident.md, decoded in registers: few rows split over K, many in tiles."""

import torch
import triton
import triton.language as tl

from .shaped_combine_launch import interpretable

SEGMENT = 1024  # weights; a program starts at any of them
PROGRAMS = 1024  # that fill the largest GPU; a constant, so that no result depends on the card


@triton.jit
def _decode(RAW, PLANES, ESCAPES, n, k, inside, window, begin, blocks, escape_count,
            CODE: tl.constexpr, HALF: tl.constexpr, E5M2: tl.constexpr):  # fmt: skip
    """float32 [n, k] of W, zero outside, and where the escapes of the next columns begin."""
    if E5M2:  # the high bytes of HALF's words, whose low ones are zero
        raw = tl.zeros(inside.shape, tl.int32)
    else:
        raw = tl.load(RAW + n[:, None] * (blocks * 64) + k[None, :], mask=inside, other=0).to(tl.int32)
    PLANE_COUNT: tl.constexpr = CODE + 3 if HALF else CODE
    plane = PLANES + n[:, None] * (PLANE_COUNT * blocks * 8) + (k >> 3)[None, :]
    shift = (k & 7)[None, :]
    code = tl.zeros_like(raw)
    for p in tl.static_range(CODE):
        bits = tl.load(plane + p * blocks * 8, mask=inside, other=0).to(tl.int32)
        code |= (bits >> shift & 1) << p
    LAST: tl.constexpr = (1 << CODE) - 1
    escaped = (code == LAST).to(tl.int32)
    place = begin[:, None] + tl.cumsum(escaped, 1) - 1
    held = (escaped == 1) & (place < escape_count)
    patch = tl.load(ESCAPES + place, mask=held, other=0).to(tl.int32)
    exponent = window[:, None] + code ^ patch
    if HALF:
        word = raw | exponent << 10
        for p in tl.static_range(3):
            bits = tl.load(plane + (CODE + p) * blocks * 8, mask=inside, other=0).to(tl.int32)
            word |= (bits >> shift & 1) << (15 if p == 2 else 8 + p)
        weight = word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        word = (raw & 0x80) << 24 | exponent << 23 | (raw & 0x7F) << 16
        weight = word.to(tl.float32, bitcast=True)
    return tl.where(inside, weight, 0.0), begin + tl.sum(escaped, 1)


@triton.jit
def _packed_linear(X, RAW, PLANES, ESCAPES, OFFSETS, WINDOW, BIAS, OUT, batch, rows, columns, blocks, segments,
                   escape_count, segments_each, bias_stride, CODE: tl.constexpr, HALF: tl.constexpr, E5M2: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """OUT [splits, batch, rows]: the part of x Wᵀ that each split of K gives; the bias goes to the first."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    split = tl.program_id(2)
    here = n < rows
    window = tl.load(WINDOW + n, mask=here, other=0).to(tl.int32)
    begin = tl.load(OFFSETS + n * segments + split * segments_each, mask=here, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), escape_count)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    stop = tl.minimum((split + 1) * segments_each * 1024, columns)
    for first in range(split * segments_each * 1024, stop, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = here[:, None] & (k < columns)[None, :]
        weight, begin = _decode(
            RAW, PLANES, ESCAPES, n, k, inside, window, begin, blocks, escape_count, CODE, HALF, E5M2
        )
        x = tl.load(
            X + m[:, None] * columns + k[None, :],
            mask=(m < batch)[:, None] & (k < columns)[None, :],
            other=0.0,
        )
        if BLOCK_M == 1:
            acc += tl.sum(weight * x.to(tl.float32), 1)[None, :]
        else:
            acc = tl.dot(x, tl.trans(weight.to(x.dtype)), acc, input_precision="ieee")
    if BIAS is not None:
        bias = tl.load(BIAS + n * bias_stride, mask=here & (split == 0), other=0.0).to(tl.float32)
        acc += bias[None, :]
    out = OUT + split.to(tl.int64) * batch * rows + m[:, None] * rows + n[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=(m < batch)[:, None] & here[None, :])


@triton.jit
def _packed_linear_total(PARTS, OUT, count, splits, BLOCK: tl.constexpr):
    """OUT [count] = the sum of PARTS [splits, count], in the order of the splits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    part = PARTS + i
    for _ in range(splits):
        total += tl.load(part, mask=i < count, other=0.0)
        part += count
    tl.store(OUT + i, total.to(OUT.dtype.element_ty), mask=i < count)


def tile(batch: int, wide: bool) -> dict:
    """Rows of x, of W, columns and warps of a tile; ``wide``: float32, which multiplies in registers."""
    if batch == 1:
        return {"BLOCK_M": 1, "BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    if batch <= 16 or wide:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64 if wide else 128, "num_warps": 4, "num_stages": 3}
    # every row of x in one tile: each weight is decoded once
    rows, columns = (64, 64) if batch <= 64 else (128, 32) if batch <= 128 else (256, 32)
    return {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@interpretable("out")
def packed_linear(out, x, raw, planes, escapes, offsets, window, bias):
    """out [M, N] = x [M, K] Wᵀ + bias, x and out contiguous, of bf16, fp16 or fp32; at least one element each.

    bias [N] may have any stride. W of float8_e5m2, which has no ``raw`` bytes, takes an x of any of these.
    """
    (batch, columns), rows, blocks = x.shape, raw.shape[0], planes.shape[2]
    half, sizes = planes.shape[1] > 4, tile(batch, x.dtype == torch.float32)
    segments = triton.cdiv(columns, SEGMENT)
    tiles = triton.cdiv(rows, sizes["BLOCK_N"]), triton.cdiv(batch, sizes["BLOCK_M"])
    each = triton.cdiv(segments, min(segments, max(1, PROGRAMS // (tiles[0] * tiles[1]))))
    splits = triton.cdiv(segments, each)
    parts = out if splits == 1 else torch.empty(splits, batch, rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _packed_linear[(*tiles, splits)](
            x, raw, planes.view(torch.uint8), escapes, offsets, window, bias, parts, batch, rows, columns, blocks,
            segments, escapes.shape[0], each, 0 if bias is None else bias.stride(0), CODE=planes.shape[1] - 3 * half,
            HALF=half, E5M2=not raw.shape[1], **sizes)  # fmt: skip
        if splits > 1:
            count = batch * rows
            _packed_linear_total[(triton.cdiv(count, 1024),)](
                parts, out, count, splits, BLOCK=1024, num_warps=4
            )
