"""The header of a .safetensors file: read and checked whole, or refused; and written as safetensors writes it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gaugekit.coder.blob import CorruptFile
from gaugekit.files.missing import how_to_convert

MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors itself sets
MAX_RANK = 64
SUFFIX = ".safetensors"
LFS_POINTER = b"version https://git-lfs."
BITS = {  # an element's, in the order of safetensors' own enumeration: it stores the last ones first
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its bytes are [begin, end) of the data that follow the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A file's header: its bytes as they stand, its metadata (None where it has none), its tensors in the
    order of their bytes.
    """

    raw: bytes
    metadata: dict[str, str] | None
    entries: list[Entry]

    @property
    def data_start(self) -> int:
        return 8 + len(self.raw)

    @property
    def data_bytes(self) -> int:
        return self.entries[-1].end if self.entries else 0

    @property
    def file_bytes(self) -> int:
        return self.data_start + self.data_bytes


def read_raw(file: BinaryIO) -> bytes:
    """The header bytes of a .safetensors file; CorruptFile for another, with what may be done about it."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(8)
    if size < 8:
        raise CorruptFile(f"not a .safetensors file: it has {size} bytes, fewer than the length of a header")
    length = int.from_bytes(start, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        if (start + file.read(len(LFS_POINTER))).startswith(LFS_POINTER):
            raise CorruptFile(
                "not a .safetensors file, but Git LFS's pointer to one: git lfs pull fetches it"
            )
        raise CorruptFile(
            "not a .safetensors file: its header is longer than the file or than 100 MB"
            + how_to_convert(Path(file.name))
        )
    return file.read(length)


def _no_duplicates(pairs: list) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def parse_object(text: str | bytes, what: str) -> dict:
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{what} is not sound JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"{what} is not a JSON object")
    return value


def natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(name: str, value) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    sound = (
        isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    )
    if (
        not sound
        or len(shape) > MAX_RANK
        or not all(map(natural, shape + offsets))
        or offsets[0] > offsets[1]
    ):
        raise CorruptFile(f"tensor {name!r}: dtype, shape or data_offsets make no sense")
    entry = Entry(name, dtype, tuple(shape), *offsets)
    if dtype in BITS and entry.weights * BITS[dtype] != 8 * entry.size:
        raise CorruptFile(f"tensor {name!r}: {dtype} {shape} does not take {entry.size} bytes")
    return entry


def parse_header(raw: bytes, data_bytes: int | None = None) -> Header:
    """The header in ``raw``; its tensors must fill the data from end to end, ``data_bytes`` of them if
    given.
    """
    fields = parse_object(raw, "the header")
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and (
        not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values())
    ):
        raise CorruptFile("__metadata__ is not a map of strings")
    entries = sorted((_entry(name, value) for name, value in fields.items()), key=lambda e: (e.begin, e.end))
    try:
        "".join(
            (*fields, *(entry.dtype for entry in entries), *(metadata or {}), *(metadata or {}).values())
        ).encode()
    except UnicodeEncodeError:
        raise CorruptFile("a tensor's name, its dtype or the metadata is no Unicode text") from None
    cursor = 0
    for entry in entries:
        if entry.begin != cursor:
            raise CorruptFile(
                f"tensor {entry.name!r}: expected its bytes to begin at {cursor}, got {entry.begin}"
            )
        cursor = entry.end
    if data_bytes is not None and cursor != data_bytes:
        raise CorruptFile(f"the tensors take {cursor} bytes, the file holds {data_bytes}")
    return Header(raw, metadata, entries)


def render_plain(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None) -> bytes:
    """The header that safetensors itself writes for tensors of these (dtype, shape): by dtype, then by name."""
    fields = {} if metadata is None else {"__metadata__": dict(metadata)}
    rank = {dtype: -place for place, dtype in enumerate(BITS)}
    cursor = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (rank[item[1][0]], item[0])):
        end = cursor + math.prod(shape) * BITS[dtype] // 8
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [cursor, end]}
        cursor = end
    raw = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)
