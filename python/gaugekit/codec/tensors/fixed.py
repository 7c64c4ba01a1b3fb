"""The fixed-length layout of docs/resident.md as one run of bytes: for transfers, where speed matters more than ratio.

docs/format.md has it byte for byte: a header, and the five tensors for rows of 1,024 elements of the flattened tensor.
Checksum kind 1 is crc32c, for which processors have an instruction; kind 2, made on a GPU, is Σ (2i + 1) w_i mod 2^64
over the 64-bit words w_i.
"""

from __future__ import annotations

import math
import struct

import torch

from gaugekit.codec.tensors.blob import fresh
from gaugekit.ops.packed_linear import layout
from gaugekit.ops.packed_linear.weight import PackedWeight, pack_weight
from gaugekit.ops.rans import operator as rans
from gaugekit.ops.rans.header import padded, sealed, unsealed
from gaugekit.ops.rans.operator import CorruptFile

MAGIC, VERSION, ROW = b"GKFIXD\x1a\n", 1, layout.SEGMENT
FIELDS = struct.Struct("<8sHBBBBHQQQII")
ELEMENTS = {torch.bfloat16: 1, torch.float16: 2}
CRC32C, WORD_SUM = 1, 2
SLAB = 1 << 20  # words summed at once


def encode(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes] on the tensor's device; ValueError unless it is bfloat16 or float16."""
    if tensor.dtype not in ELEMENTS:
        raise ValueError(f"tensor: expected bfloat16 or float16 for layout='fixed', got {tensor.dtype}")
    flat, on_cpu = tensor.detach().reshape(-1), tensor.device.type == "cpu"
    count, missing = flat.numel(), -flat.numel() % ROW
    packed = pack_weight((torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, ROW))
    parts = (packed.planes, packed.offsets, packed.raw, packed.window, packed.escapes)
    begin = FIELDS.size + padded(8 * tensor.dim())
    size = torch.Size([begin + sum(padded(part.nbytes) for part in parts)])
    blob = fresh(size, torch.uint8) if on_cpu else torch.empty(size, dtype=torch.uint8, device=tensor.device)
    end = begin
    for part in parts:
        start, end = end, end + padded(part.nbytes)
        blob[start : start + part.nbytes] = part.reshape(-1).view(torch.uint8)
        blob[start + part.nbytes : end] = 0
    kind = CRC32C if on_cpu else WORD_SUM
    code_bits = layout.layout(packed.raw, packed.planes)[1]
    fields = [MAGIC, VERSION, ELEMENTS[tensor.dtype], code_bits, tensor.dim(), kind, 0]
    fields += [count, packed.escapes.numel(), _checksum(blob[begin:], kind), 0]
    head = sealed(FIELDS, fields, tensor.shape)
    blob[:begin] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    return blob


def is_fixed(blob: torch.Tensor) -> bool:
    """Whether ``blob`` begins as ``encode`` begins."""
    return blob.numel() >= FIELDS.size and bytes(blob[:8].tolist()) == MAGIC


def decode(blob: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """The tensor on the blob's device, or flat its elements [start, stop); CorruptFile for damage."""
    packed, shape = _opened(blob)
    count = math.prod(shape)
    if stop is None:
        rows = torch.ops.gaugekit.packed_rows(None, *packed)
        return rows.reshape(-1)[:count].view(shape)
    if not 0 <= start <= stop <= count:
        raise ValueError(f"start, stop: expected 0 <= start <= stop <= {count}, got {start} and {stop}")
    first = start // ROW
    index = torch.arange(first, -(-stop // ROW), device=blob.device)
    return torch.ops.gaugekit.packed_rows(index, *packed).reshape(-1)[
        start - first * ROW : stop - first * ROW
    ]


def described(blob: torch.Tensor) -> tuple[torch.dtype, torch.Size]:
    """(dtype, shape) of what a blob holds, by its header, which alone is looked at; CorruptFile."""
    _, element, *_, shape = _header(blob)
    return next(dtype for dtype, number in ELEMENTS.items() if number == element), shape


def _header(blob: torch.Tensor) -> tuple[int, int, int, int, int, int, int, torch.Size]:
    """(where the parts begin, element, bits of the code, kind of checksum, elements, escapes, checksum, shape)."""
    head = bytes(blob[: FIELDS.size].tolist())
    _, version, element, code_bits, rank, kind, zero, count, escapes, checksum, none, _ = FIELDS.unpack(head)
    begin = FIELDS.size + padded(8 * rank)
    dims = bytes(blob[FIELDS.size : begin].tolist())
    known = version == VERSION and element in ELEMENTS.values() and code_bits in (3, 4) and not zero | none
    if not known or kind not in (CRC32C, WORD_SUM) or rank > 64 or len(dims) != begin - FIELDS.size:
        raise CorruptFile("not a sound transfer blob: its header is not one this version reads")
    dimensions = unsealed(FIELDS, head + dims, rank)
    if dimensions is None:
        raise CorruptFile("not a sound transfer blob: the header's checksum is wrong")
    return begin, element, code_bits, kind, count, escapes, checksum, torch.Size(dimensions)


def _opened(blob: torch.Tensor) -> tuple[PackedWeight, torch.Size]:
    begin, element, code_bits, kind, count, escapes, checksum, shape = _header(blob)
    rows = -(-count // ROW)
    planes = code_bits + (3 if element == ELEMENTS[torch.float16] else 0)
    sizes = [rows * planes * ROW // 8, 4 * (rows + 1), rows * ROW, rows, escapes]
    ends = [begin]
    for size in sizes:
        ends.append(ends[-1] + padded(size))
    if count != math.prod(shape) or ends[-1] != blob.numel():
        raise CorruptFile("not a sound transfer blob: its length is not the sum of its parts")
    if blob.data_ptr() % 16 or blob.storage_offset() % 16:
        blob = blob.clone()
    if _checksum(blob[begin:], kind) != checksum:
        raise CorruptFile("not a sound transfer blob: the checksum of its parts is wrong")
    parts = [blob[end : end + size] for end, size in zip(ends, sizes, strict=False)]
    return PackedWeight(
        parts[2].view(rows, ROW),
        parts[0].view(torch.int64).view(rows, planes, ROW // 64),
        parts[4],
        parts[1].view(torch.int32),
        parts[3],
        ROW,
    ), shape


def _checksum(body: torch.Tensor, kind: int) -> int:
    if kind == CRC32C:
        return rans.crc32c(body.cpu())
    total = torch.zeros((), dtype=torch.int64, device=body.device)
    words = body.view(torch.int64)
    for start in range(0, words.numel(), SLAB):
        part = words[start : start + SLAB]
        factors = torch.arange(2 * start + 1, 2 * (start + part.numel()), 2, device=body.device)
        total += (part * factors).sum()
    return total.item() & (1 << 64) - 1
