"""One tensor, one coded blob."""

from __future__ import annotations

import contextlib
import mmap
import warnings
from typing import TypeAlias

import numpy as np
import torch

from gaugekit.coder.blob import usual_chunk_log2
from gaugekit.ops.operands import check_tensors
from gaugekit.ops.rans import operator as rans

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | np.ndarray | torch.Tensor
MAPPED_BYTES = 1 << 25  # from here on the C library maps memory anew for each allocation, too


def encode(tensor: torch.Tensor, *, symbols: str | None = None, chunk_log2: int | None = None) -> bytes:
    """``tensor`` [any shape, any strides] of bfloat16, float16, float32, float8_e4m3fn, float8_e5m2 or int8 as a
    coded blob, bit for bit recoverable.

    ``symbols`` says which bits of an element are entropy-coded, the others being stored as they are: "exponent"
    (default for bfloat16 and float32), "high-byte" (default for the others, and their only choice) or
    "exponent-and-mantissa", the exponent and the two highest bits of the mantissa (bfloat16 only: about 0.6 % smaller,
    slower). ``chunk_log2`` (14 to 20; default 17, with "exponent-and-mantissa", whose tables are larger, 18) is log2 of
    the symbols a chunk: smaller chunks are read in smaller pieces and cost more bytes.
    ValueError for other dtypes, devices or numbers. Format: docs/format.md.
    """
    check_tensors(tensor=tensor)
    return encode_bytes(tensor, symbols=symbols, chunk_log2=chunk_log2).numpy().tobytes()


def encode_bytes(
    tensor: torch.Tensor, *, symbols: str | None = None, chunk_log2: int | None = None, front: int = 0
) -> torch.Tensor:
    """``encode`` without the copy into ``bytes``: uint8 [bytes], behind ``front`` bytes that the caller fills."""
    if tensor.dtype in rans.SYMBOLS and symbols is None:
        symbols = rans.SYMBOLS[tensor.dtype][0]
    if chunk_log2 is None:
        chunk_log2 = usual_chunk_log2(symbols)
    return rans.encode(tensor, symbols, chunk_log2, front=front)


def decode(blob: Buffer, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor that ``blob`` (anything with the buffer protocol, or a uint8 tensor) was made from.

    ``out``, a contiguous CPU tensor of the same dtype and shape, is filled and returned instead of a new
    one; after an error its contents are undefined. CorruptFile for damaged bytes, ValueError for an ``out``
    that does not fit.
    """
    blob = as_byte_tensor(blob)
    dtype, shape = rans.open_blob(blob)
    out = _target(out, dtype, shape)
    rans.decode(blob, 0, out.numel(), out)
    return out


def decode_range(blob: Buffer, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Elements [start, stop) of the flattened tensor, one-dimensional; only the chunks that hold them are
    decoded.
    """
    blob = as_byte_tensor(blob)
    dtype, shape = rans.open_blob(blob)
    if not 0 <= start <= stop <= shape.numel():
        raise ValueError(
            f"start, stop: expected 0 <= start <= stop <= {shape.numel()}, got {start} and {stop}"
        )
    out = _target(out, dtype, torch.Size([stop - start]))
    rans.decode(blob, start, stop, out)
    return out


def as_byte_tensor(data: Buffer) -> torch.Tensor:
    """A uint8 vector over ``data`` without a copy (bytes, mmap, array, uint8 tensor); it is only ever
    read.
    """
    if isinstance(data, torch.Tensor):
        if data.dtype != torch.uint8 or data.dim() != 1 or data.device.type != "cpu":
            raise ValueError(
                "blob: expected bytes or a one-dimensional uint8 CPU tensor, "
                f"got {data.dtype} {list(data.shape)} on {data.device}"
            )
        return data.contiguous()
    try:
        array = np.frombuffer(data, np.uint8)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"blob: expected bytes or a uint8 tensor, got {type(data).__name__} ({error})"
        ) from None
    with warnings.catch_warnings():  # torch cannot mark a tensor read-only and says so
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def fresh(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor. A large one is mapped in huge pages where the system has them: filling new
    pages of 4 KiB takes longer than decoding into them.
    """
    size = shape.numel() * dtype.itemsize
    if size < MAPPED_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages maps small ones
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _target(out: torch.Tensor | None, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if out is None:
        return fresh(shape, dtype)
    check_target(out, dtype, shape)
    return out


def check_target(out: object, dtype: torch.dtype, shape: torch.Size) -> None:
    """ValueError unless ``out`` can be filled with a tensor of this dtype and shape."""
    given = (
        f"{out.dtype} {list(out.shape)} on {out.device}"
        if isinstance(out, torch.Tensor)
        else type(out).__name__
    )
    fits = isinstance(out, torch.Tensor) and out.dtype == dtype and out.shape == shape
    if not fits or out.device.type != "cpu" or not out.is_contiguous() or out.requires_grad:
        raise ValueError(
            f"out: expected a contiguous CPU tensor of {dtype} {list(shape)} without grad, got {given}"
        )
    if out.is_neg():
        raise ValueError("out: expected memory to write to, got a view that negates what is there")
