"""A coded blob made, checked and decoded: uint8 arrays in and out, the same bytes from C++ and from NumPy."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gaugekit.coder import binary, composition, encoder, header
from gaugekit.coder.crc32c import crc32c as composed_crc32c

# which bits of an element are its symbol -> their number in a file
KINDS = {"exponent": 0, "high-byte": 1, "exponent-and-mantissa": 2}


@dataclass(frozen=True)
class Element:
    """A type of elements that can be coded: its number in a blob, its width in bytes, torch's name for it, and the
    symbols it can have, the ones it has unless asked first.
    """

    number: int
    width: int
    torch: str
    symbols: tuple[str, ...]


ELEMENTS = {  # by the names that .safetensors files have for them
    "BF16": Element(1, 2, "bfloat16", ("exponent", "high-byte", "exponent-and-mantissa")),
    "F16": Element(2, 2, "float16", ("high-byte",)),
    "F32": Element(3, 4, "float32", ("exponent", "high-byte")),
    "F8_E4M3": Element(4, 1, "float8_e4m3fn", ("high-byte",)),
    "F8_E5M2": Element(5, 1, "float8_e5m2", ("high-byte",)),
    "I8": Element(6, 1, "int8", ("high-byte",)),
}
BY_NUMBER = {element.number: name for name, element in ELEMENTS.items()}


class CorruptFile(ValueError):
    """The bytes are damaged, or made by a version this one cannot read. The only error that damage raises."""


def checked(function: Callable, *arguments: Any) -> Any:
    """The function's answer; its complaint about the blob as CorruptFile, any other as it stands."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        _, prefix, sentence = str(error).partition(header.CORRUPT)
        if not prefix:
            raise
        raise CorruptFile("not a sound coded blob: " + sentence.splitlines()[0]) from None


def parse_header(head: bytes, size: int) -> header.BlobHeader:
    """The header of a blob of ``size`` bytes, from its first bytes; CorruptFile."""
    return checked(header.parse, head, size)


def header_bytes(start: bytes) -> int:
    """How many bytes the header takes of a blob that begins with ``start`` (48 bytes); CorruptFile."""
    return checked(header.header_bytes, start)


def usual_chunk_log2(symbols: str) -> int:
    """log2 of the symbols a chunk: larger tables take larger chunks."""
    return 18 if symbols == "exponent-and-mantissa" else 17


def threads() -> int:
    """How many threads code one blob: torch's number where torch is there, else what it would take."""
    number = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if number is not None:
        return number()
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_bytes(
    data: np.ndarray,
    shape: tuple[int, ...],
    dtype: str,
    symbols: str | None = None,
    path: int = -1,
    room: Callable[[int], np.ndarray] | None = None,
) -> np.ndarray:
    """The blob, uint8 [bytes], of elements of ``ELEMENTS[dtype]``, whose bytes are ``data``.

    ``symbols``: some of the element's own, None for the usual ones. ``path`` as in ``ops.rans.operator.encode``.
    ``room(bytes)`` may give the memory for it.
    """
    element = ELEMENTS[dtype]
    symbols = element.symbols[0] if symbols is None else symbols
    kind, log2, rank = KINDS[symbols], usual_chunk_log2(symbols), len(shape)
    if (
        math.prod(shape) * element.width != data.size
        or symbols not in element.symbols
        or rank > header.MAX_RANK
    ):
        raise ValueError(
            f"data, shape, symbols: {data.size} bytes of {dtype} {list(shape)}, {symbols!r}: do not fit"
        )
    library = binary.library()
    if library is None:
        return encoder.encode(data, shape, element.number, kind, log2)
    data, dims = np.ascontiguousarray(data), np.array(shape, np.int64)
    most = library.gaugekit_rans_room(data.size, element.number, log2, rank)
    out = np.empty(most, np.uint8) if room is None else room(most)
    size = ctypes.c_uint64()
    dims_at, out_at = dims.ctypes.data, out.ctypes.data
    numbers = (element.number, kind, log2, dims_at, rank, out_at, ctypes.addressof(size), threads(), path)
    _check(library.gaugekit_rans_encode(data.ctypes.data, data.size, *numbers))
    return out[: size.value]


def open_blob(blob: np.ndarray) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) that a blob holds, after its header, index and sizes were checked; CorruptFile."""
    library = binary.library()
    if library is None:
        opened = checked(composition.open_blob, blob)
        return BY_NUMBER[opened.element], opened.shape
    fields = np.empty(5 + header.MAX_RANK, np.int64)
    _check(library.gaugekit_rans_open(blob.ctypes.data, blob.size, fields.ctypes.data))
    element, _, _, _, rank, *shape = fields.tolist()
    return BY_NUMBER[element], tuple(shape[:rank])


def decode(blob: np.ndarray, start: int, stop: int, out: np.ndarray, path: int = -1) -> None:
    """Elements [start, stop) of the blob, counted in row-major order, as bytes into ``out``; CorruptFile."""
    library = binary.library()
    if library is None:
        checked(composition.decode, blob, start, stop, out)
        return
    dtype, shape = open_blob(blob)
    fits = 0 <= start <= stop <= math.prod(shape) and out.size == (stop - start) * ELEMENTS[dtype].width
    if not fits or not out.flags.c_contiguous or out.dtype != np.uint8:
        raise RuntimeError("start, stop, out: not a range of the blob")
    at = blob.ctypes.data, blob.size
    _check(library.gaugekit_rans_decode(*at, start, stop, out.ctypes.data, threads(), path))


def crc32c(data: np.ndarray | bytes, crc: int = 0) -> int:
    """CRC-32C (RFC 3720) of bytes; ``crc`` continues the checksum of what came before them."""
    if not isinstance(data, np.ndarray):
        data = np.frombuffer(data, np.uint8)
    library = binary.library()
    if library is None:
        return composed_crc32c(data, crc)
    return library.gaugekit_crc32c(data.ctypes.data, data.size, crc)


def _check(error: bytes | None) -> None:
    if error is None:
        return
    if error == b"out of memory":
        raise MemoryError("the coder's own")
    raise CorruptFile("not a sound coded blob: " + error.decode())
