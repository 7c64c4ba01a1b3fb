"""encode and decode: one tensor to bytes and back, by either layout."""

from __future__ import annotations

import torch

from gaugekit.codec.tensors import blob as coded
from gaugekit.codec.tensors import fixed
from gaugekit.codec.tensors.blob import Buffer
from gaugekit.ops.operands import check_tensors

LAYOUTS = ("rans", "fixed")


def encode(
    tensor: torch.Tensor, *, layout: str = "rans", symbols: str | None = None, chunk_log2: int | None = None
) -> bytes | torch.Tensor:
    """``tensor`` (any shape, strides, bit patterns) in fewer bytes, bit for bit recoverable by ``decode``.

    ``layout="rans"``, for files: ``bytes``, the smallest. bfloat16, float16, float32, float8_e4m3fn, float8_e5m2 or
    int8 on the CPU.
    ``symbols`` says which bits of an element are entropy-coded, the others being stored as they are: "exponent"
    (default for bfloat16 and float32), "high-byte" (default for the others, and their only choice) or
    "exponent-and-mantissa", the exponent and the two highest bits of the mantissa (bfloat16 only: about 0.6 % smaller,
    slower). ``chunk_log2`` (14 to 20; default 17, with "exponent-and-mantissa", whose tables are larger, 18) is log2 of
    the symbols a chunk: smaller chunks are read in smaller pieces and cost more bytes.

    ``layout="fixed"``, for transfers: a uint8 tensor on the tensor's device, some 4 % larger and as simple as a GPU
    likes it; bfloat16 or float16 on any device. ``symbols`` and ``chunk_log2`` do not go with it.

    ValueError for other dtypes, devices, layouts or numbers. Formats: docs/format.md, ``gaugekit.codec.fixed``.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    check_tensors(tensor=tensor)
    tensor = tensor.resolve_neg()  # a view that negates has other bits in memory than it shows
    if layout == "rans":
        return coded.encode(tensor, symbols=symbols, chunk_log2=chunk_log2)
    if symbols is not None or chunk_log2 is not None:
        raise ValueError("symbols, chunk_log2: expected None with layout='fixed', which has none")
    return fixed.encode(tensor)


def decode(blob: Buffer, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor that ``blob`` (anything with the buffer protocol, or a uint8 tensor) was made from; which layout made
    it is seen from its first bytes.

    ``out``, a contiguous tensor of the same dtype, shape and device, is filled and returned instead of a new one; after
    an error its contents are undefined. CorruptFile for damaged bytes, ValueError for an ``out`` that does not fit.
    """
    data = _bytes(blob)
    if not fixed.is_fixed(data):
        return coded.decode(data, out)
    tensor = fixed.decode(data)
    if out is None:
        return tensor
    fits = isinstance(out, torch.Tensor) and (out.dtype, out.shape, out.device) == (
        tensor.dtype,
        tensor.shape,
        tensor.device,
    )
    if not fits or not out.is_contiguous() or out.requires_grad:
        raise ValueError(f"out: expected a contiguous {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    return out.copy_(tensor)


def decode_range(blob: Buffer, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Elements [start, stop) of the flattened tensor, one-dimensional; only the chunks (or rows of 1,024 elements) that
    hold them are decoded. ``out`` goes with layout "rans".
    """
    data = _bytes(blob)
    if not fixed.is_fixed(data):
        return coded.decode_range(data, start, stop, out)
    if out is not None:
        raise ValueError("out: expected None for a blob of layout 'fixed'")
    return fixed.decode(data, start, stop)


def _bytes(blob: Buffer) -> torch.Tensor:
    if isinstance(blob, torch.Tensor) and blob.dtype == torch.uint8 and blob.dim() == 1:
        return blob.contiguous()
    return coded.as_byte_tensor(blob)
