"""The packed layout (docs/resident.md) by torch operators alone, on any device: what answers where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, SEGMENT = 64, 1024
SLAB = 1 << 20  # weights handled at once: the intermediate arrays are some thirty times as large


def fields(dtype: torch.dtype) -> tuple[int, int, list[int]]:
    """(first bit of the exponent, largest exponent, bits of the planes after the code's) of the words of a dtype:
    bfloat16, float16, or float8_e5m2, whose numbers are high bytes of float16 words."""
    return (7, 255, []) if dtype == torch.bfloat16 else (10, 31, [8, 9, 15])


def layout(raw: Tensor, planes: Tensor) -> tuple[torch.dtype, int]:
    """(dtype of the weights, bits of the exponent's code) that a number of planes stands for; float16's planes without
    raw bytes are float8_e5m2's."""
    count = planes.shape[1]
    if count <= 4:
        return torch.bfloat16, count
    return (torch.float16 if raw.shape[1] or not planes.shape[2] else torch.float8_e5m2), count - 3


def words_of_e5m2(weight: Tensor) -> Tensor:
    """The float16 numbers that float8_e5m2 ones are, each its bits and eight zeros."""
    return (weight.contiguous().view(torch.uint8).to(torch.int16) << 8).view(torch.float16)


def blocks_of(columns: int) -> int:
    return -(-columns // BLOCK)


def segments_of(columns: int) -> int:
    return -(-columns // SEGMENT)


def slabs(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows of at most SLAB weights; none where there are no weights."""
    step = max(1, SLAB // max(1, columns))
    return [(first, min(first + step, rows)) for first in range(0, rows if columns else 0, step)]


def survey(weight: Tensor) -> Tensor:
    """int32 [N, 2, 2]: for codes of 3 and 4 bits each row's window and how many exponents it leaves outside."""
    first, largest, _ = fields(weight.dtype)
    out = torch.zeros(weight.shape[0], 2, 2, dtype=torch.int32, device=weight.device)
    for start, stop in slabs(*weight.shape):
        exponents = weight[start:stop].contiguous().view(torch.int16).long() >> first & largest
        counts = exponents.new_zeros(stop - start, largest + 2)
        counts.scatter_add_(1, exponents + 1, torch.ones_like(exponents))
        below = counts.cumsum(1)
        for c, width in enumerate((7, 15)):
            inside = below[:, width:-1] - below[:, : -1 - width]
            most = inside.amax(1, keepdim=True)
            out[start:stop, c, 0] = (inside == most).to(torch.uint8).argmax(1)
            out[start:stop, c, 1] = weight.shape[1] - most[:, 0]
    return out


def encode(
    weight: Tensor, window: Tensor, begins: Tensor, code_bits: int, escape_count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """raw, planes, escapes and offsets of ``weight`` once every row's window and first escape are known."""
    first, largest, further = fields(weight.dtype)
    (rows, columns), last = weight.shape, 2**code_bits - 1
    blocks, segments, device = blocks_of(columns), segments_of(columns), weight.device
    raw = torch.zeros(rows, blocks * BLOCK, dtype=torch.uint8, device=device)
    planes = torch.empty(rows, code_bits + len(further), blocks, dtype=torch.int64, device=device)
    escapes = torch.zeros(escape_count, dtype=torch.uint8, device=device)
    offsets = torch.full((rows * segments + 1,), escape_count, dtype=torch.int32, device=device)
    place = torch.arange(8, device=device, dtype=torch.int32)
    for start, stop in slabs(rows, columns):
        words = weight[start:stop].contiguous().view(torch.int16).int() & 0xFFFF
        base = window[start:stop, None].int()
        exponents = words >> first & largest
        code = exponents - base
        code = torch.where((code >= 0) & (code < last), code, last)
        outside = code == last
        byte = words >> 8 & 0x80 | words & 0x7F if first == 7 else words & 0xFF
        raw[start:stop, :columns] = byte.to(torch.uint8)
        for p in range(planes.shape[1]):
            bits = code >> p & 1 if p < code_bits else words >> further[p - code_bits] & 1
            bits = torch.nn.functional.pad(bits, (0, blocks * BLOCK - columns)).view(stop - start, -1, 8)
            packed = (bits << place).sum(2).to(torch.uint8)
            planes[start:stop, p] = packed.flatten().view(torch.int64).view(-1, blocks)
        if segments:
            seen = torch.nn.functional.pad(outside.int().cumsum(1), (1, 0))[:, :columns:SEGMENT]
            offsets[start * segments : stop * segments] = (begins[start:stop, None] + seen).flatten().int()
        patches = (exponents ^ (base + last))[outside].to(torch.uint8)
        escapes[begins[start] : begins[start] + len(patches)] = patches
    return raw, planes, escapes, offsets


def rows(
    index: Tensor | None,
    raw: Tensor,
    planes: Tensor,
    escapes: Tensor,
    offsets: Tensor,
    window: Tensor,
    columns: int,
) -> Tensor:
    """W[index] (None: all of W) as a new tensor [len(index), columns]."""
    dtype, _ = layout(raw, planes)
    count = raw.shape[0] if index is None else index.shape[0]
    out = torch.empty(count, columns, dtype=torch.int16, device=raw.device)
    escapes = torch.cat([escapes, escapes.new_zeros(1)])
    for start, stop in slabs(count, columns):
        at = torch.arange(start, stop, device=raw.device) if index is None else index[start:stop]
        out[start:stop] = _words(at, raw, planes, escapes, offsets, window, columns)
    return (out >> 8).to(torch.uint8).view(dtype) if dtype == torch.float8_e5m2 else out.view(dtype)


def _words(at: Tensor, raw, planes, escapes, offsets, window, columns: int) -> Tensor:
    dtype, code_bits = layout(raw, planes)
    first, _, further = fields(dtype)
    segments, end = segments_of(columns), escapes.shape[0] - 1
    place = torch.arange(8, device=raw.device, dtype=torch.uint8)
    held = planes[at].flatten().view(torch.uint8).view(len(at), planes.shape[1], -1, 1)
    bits = (held >> place & 1).flatten(2)[..., :columns].int()
    code = sum(bits[:, p] << p for p in range(code_bits))
    outside = code == 2**code_bits - 1
    padded = torch.nn.functional.pad(outside.int(), (0, segments * SEGMENT - columns)).unflatten(
        1, (segments, SEGMENT)
    )
    begins = offsets[:-1].view(-1, segments)[at].clamp(0, end)
    place = (begins[..., None] + padded.cumsum(2) - 1).flatten(1)[:, :columns].clamp(0, end)
    patches = torch.where(outside, escapes[place.long()].int(), 0)
    words = raw[at, :columns].int() if raw.shape[1] else 0
    exponents = (window[at, None].int() + code ^ patches) << first
    if not further:
        return ((words & 0x80) << 8 | exponents | words & 0x7F).to(torch.int16)
    return (words | exponents | sum(bits[:, code_bits + p] << i for p, i in enumerate(further))).to(
        torch.int16
    )


def offsets_of(planes: Tensor) -> Tensor:
    """int64 [N·S + 1]: the running number of escaped codes before each segment, as the planes have them."""
    count = planes.shape[1]
    code_bits = count if count <= 4 else count - 3
    mask = planes[:, 0]
    for p in range(1, code_bits):
        mask = mask & planes[:, p]
    mask = mask - (mask >> 1 & 0x5555555555555555)
    mask = (mask & 0x3333333333333333) + (mask >> 2 & 0x3333333333333333)
    mask = mask + (mask >> 4) & 0x0F0F0F0F0F0F0F0F
    counts = sum(mask >> shift & 0xFF for shift in range(0, 64, 8))
    short = -counts.shape[1] % (SEGMENT // BLOCK)
    counts = torch.nn.functional.pad(counts, (0, short)).unflatten(1, (-1, SEGMENT // BLOCK)).sum(-1)
    return torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
