"""The headers of .safetensors files, plain and packed (docs/format.md): read and checked whole, or
refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import torch

from ..ops import rans
from ..ops.rans import CorruptFile, crc32c
from .blob import as_byte_tensor

VERSION = 1
MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors itself sets
MAX_RANK = 64
SUFFIX = ".safetensors"
DTYPES = {  # in the order of safetensors' own enumeration: it stores the last ones first
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
# A packed file's header begins with exactly these bytes, so the checksum's eight digits stand at a known
# place.
PREFIX = b'{"__metadata__":{"gaugekit":"{\\"header_crc32c\\":\\"'
DIGITS = slice(len(PREFIX), len(PREFIX) + 8)


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


@dataclass(frozen=True)
class Packed:
    """A packed file's header: what is stored, what it stands for, and how each tensor is coded and
    checked.
    """

    stored: Header
    original: Header
    tensors: dict[str, tuple[str, int]]  # name -> (codec, crc32c of the stored bytes)


@contextmanager
def naming(what: str | os.PathLike) -> Iterator[None]:
    """Errors about damage say which file, or what in it, is damaged."""
    try:
        yield
    except CorruptFile as error:
        raise CorruptFile(f"{what}: {error}") from None


def seems_packed(path: str | os.PathLike) -> bool:
    """Whether the file begins as packed files do, or as one would whose beginning is damaged."""
    with open(path, "rb") as file:
        head = file.read(8 + len(PREFIX))
    return b"gaugekit" in head or b"header_crc32c" in head


def codable(dtype: str) -> bool:
    """Whether tensors of this dtype of the header can be coded."""
    return DTYPES.get(dtype) in rans.ELEMENTS


def read_raw(file: BinaryIO) -> bytes:
    """The header bytes of a .safetensors file."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise CorruptFile("not a .safetensors file: its header is longer than the file or than 100 MB")
    return file.read(length)


def _no_duplicates(pairs: list) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _parse(text: str | bytes, what: str) -> dict:
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{what} is not sound JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"{what} is not a JSON object")
    return value


def _natural(value) -> bool:
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
        or not all(map(_natural, shape + offsets))
        or offsets[0] > offsets[1]
    ):
        raise CorruptFile(f"tensor {name!r}: dtype, shape or data_offsets make no sense")
    entry = Entry(name, dtype, tuple(shape), *offsets)
    if dtype in ITEM_BYTES and entry.weights * ITEM_BYTES[dtype] != entry.size:
        raise CorruptFile(f"tensor {name!r}: {dtype} {shape} does not take {entry.size} bytes")
    return entry


def parse_header(raw: bytes, data_bytes: int | None = None) -> Header:
    """The header in ``raw``; its tensors must fill the data from end to end, ``data_bytes`` of them if
    given.
    """
    fields = _parse(raw, "the header")
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and (
        not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values())
    ):
        raise CorruptFile("__metadata__ is not a map of strings")
    entries = sorted((_entry(name, value) for name, value in fields.items()), key=lambda e: (e.begin, e.end))
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


def read(file: BinaryIO) -> Packed | Header:
    """The checked header of any .safetensors file, packed or ordinary; CorruptFile for a damaged one."""
    raw = read_raw(file)
    data_bytes = os.fstat(file.fileno()).st_size - 8 - len(raw)
    if raw.startswith(PREFIX):
        return _parse_packed(raw, data_bytes)
    header = parse_header(raw, data_bytes)
    metadata = header.metadata or {}
    # One damaged byte at a packed file's beginning cannot hide both.
    if "gaugekit" in metadata or any("header_crc32c" in value for value in metadata.values()):
        raise CorruptFile("the header does not begin as a packed file's does")
    return header


def render_plain(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None) -> bytes:
    """The header that safetensors itself writes for tensors of these (dtype, shape): by dtype, then by name."""
    fields = {} if metadata is None else {"__metadata__": dict(metadata)}
    rank = {dtype: -place for place, dtype in enumerate(DTYPES)}
    cursor = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (rank[item[1][0]], item[0])):
        end = cursor + math.prod(shape) * ITEM_BYTES[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [cursor, end]}
        cursor = end
    raw = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def _header_crc32c(raw: bytes) -> int:
    """Of the length field and the header, the checksum's own digits being zeros."""
    zeroed = len(raw).to_bytes(8, "little") + raw[: DIGITS.start] + b"0" * 8 + raw[DIGITS.stop :]
    return crc32c(as_byte_tensor(zeroed))


def render_packed(original: Header, stored: list[tuple[Entry, str, int]], length: int) -> bytes:
    """The header of a packed file, ``length`` bytes (0: as many as needed), from (entry, codec, crc32c) in
    data order.
    """
    inner = {
        "header_crc32c": "00000000",
        "version": VERSION,
        "header": original.raw.decode(),
        "tensors": {entry.name: [codec, crc] for entry, codec, crc in stored},
    }
    compact = {"ensure_ascii": False, "separators": (",", ":")}
    metadata = {"gaugekit": json.dumps(inner, **compact), **(original.metadata or {})}
    fields = {"__metadata__": metadata}
    for entry, _, _ in stored:
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    raw = json.dumps(fields, **compact).encode()
    raw += b" " * ((length or len(raw) + -(len(raw) + 8) % 16) - len(raw))
    digits = b"%08x" % _header_crc32c(raw)
    return raw[: DIGITS.start] + digits + raw[DIGITS.stop :]


def packed_header_bytes(original: Header) -> int:
    """Enough for the packed header whatever the coded sizes turn out to be; data then starts at a multiple
    of 16.
    """
    longest = original.file_bytes
    entries = [Entry(e.name, "U8", (*e.shape, longest), longest, longest) for e in original.entries]
    return len(render_packed(original, [(e, "rans", 0xFFFFFFFF) for e in entries], 0))


def _parse_packed(raw: bytes, data_bytes: int) -> Packed:
    if raw[DIGITS] != b"%08x" % _header_crc32c(raw):
        raise CorruptFile("the header's checksum is wrong")
    stored = parse_header(raw, data_bytes)
    inner = _parse(stored.metadata["gaugekit"], "the gaugekit entry")
    if inner.get("version") != VERSION:
        raise CorruptFile(f"its version is {inner.get('version')!r}, this gaugekit reads {VERSION}")
    if not isinstance(inner.get("header"), str) or not isinstance(inner.get("tensors"), dict):
        raise CorruptFile("the gaugekit entry lacks the original header or the tensors")
    original = parse_header(inner["header"].encode(errors="surrogatepass"))
    tensors = {}
    for name, value in inner["tensors"].items():
        if (
            not isinstance(value, list)
            or len(value) != 2
            or value[0] not in ("rans", "raw")
            or not _natural(value[1])
        ):
            raise CorruptFile(f"tensor {name!r}: its codec is not one this version reads")
        tensors[name] = tuple(value)
    by_name = {entry.name: entry for entry in original.entries}
    if not set(tensors) == set(by_name) == {entry.name for entry in stored.entries}:
        raise CorruptFile("the original header, the codecs and the stored tensors do not agree on the names")
    for entry in stored.entries:
        source, codec = by_name[entry.name], tensors[entry.name][0]
        as_raw = (entry.dtype, entry.shape, entry.size) == (source.dtype, source.shape, source.size)
        as_blob = (entry.dtype, entry.shape) == ("U8", (entry.size,)) and codable(source.dtype)
        if not (as_raw if codec == "raw" else as_blob):
            raise CorruptFile(f"tensor {entry.name!r}: what is stored does not fit the original header")
    return Packed(stored, original, tensors)


def names(file: BinaryIO) -> set[str]:
    """The names of the tensors in any .safetensors file, as the original has them; CorruptFile for a damaged one."""
    opened = read(file)
    header = opened.original if isinstance(opened, Packed) else opened
    return {entry.name for entry in header.entries}
