"""The headers of packed .safetensors files (docs/format.md): read and checked whole, or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from gaugekit.codec.files import bundle
from gaugekit.codec.files.header import (
    MAX_HEADER_BYTES,
    Entry,
    Header,
    natural,
    parse_header,
    parse_object,
    read_raw,
)
from gaugekit.coder.blob import ELEMENTS, CorruptFile, crc32c
from gaugekit.files.places import naming_file

# Of a packed file whose header lists the tensors, of one that holds the list compressed, and of one whose tensors were
# coded together: each hides bits of those before it, so none can be read alone.
VERSION, BUNDLED, CHAINED = 1, 2, 3
CHAIN = "gaugekit.bitsback"  # the one tensor that a chained file's own header lists, and the codec of all it stands for
# A packed file's header begins with exactly these bytes, so the checksum's eight digits stand at a known
# place.
PREFIX = b'{"__metadata__":{"gaugekit":"{\\"header_crc32c\\":\\"'
# Other pieces of it that stand in no ordinary file: with one of the four gone, a damaged one is still known.
MARKS = tuple(b',\\"%s\\":' % key for key in (b"version", b"header", b"tensors"))
DIGITS = slice(len(PREFIX), len(PREFIX) + 8)


@dataclass(frozen=True)
class Packed:
    """A packed file's header: what is stored, what it stands for, and how each tensor is coded and
    checked.
    """

    stored: Header
    original: Header
    tensors: dict[str, tuple[str, int]]  # name -> (codec, crc32c of the stored bytes)
    section_bytes: int = 0  # behind the tensors: what version 2 says of them
    chained: bool = False  # whether the tensors were coded together (``codec.bitsback``)

    @property
    def file_bytes(self) -> int:
        return self.stored.file_bytes + self.section_bytes


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
    return dtype in ELEMENTS


def read(file: BinaryIO) -> Packed | Header:
    """The checked header of any .safetensors file, packed or ordinary; CorruptFile for a damaged one."""
    with naming_file(file.name):
        raw = read_raw(file)
    data_bytes = os.fstat(file.fileno()).st_size - 8 - len(raw)
    if raw.startswith(PREFIX) + sum(mark in raw for mark in MARKS) < 2:
        return parse_header(raw, data_bytes)
    if not raw.startswith(PREFIX):
        raise CorruptFile("the header does not begin as a packed file's does")
    return _parse_packed(file, raw, data_bytes)


def names(file: BinaryIO) -> set[str]:
    """The names of the tensors in any .safetensors file, as the original has them; CorruptFile for a damaged one."""
    opened = read(file)
    header = opened.original if isinstance(opened, Packed) else opened
    return {entry.name for entry in header.entries}


def _header_crc32c(raw: bytes) -> int:
    """Of the length field and the header, the checksum's own digits being zeros."""
    zeroed = len(raw).to_bytes(8, "little") + raw[: DIGITS.start] + b"0" * 8 + raw[DIGITS.stop :]
    return crc32c(zeroed)


def _render(inner: dict, metadata: dict[str, str], entries: Iterable[Entry], length: int) -> bytes:
    """The header of a packed file, padded to ``length`` bytes (0: to what aligns the data), its checksum made right."""
    compact = {"ensure_ascii": False, "separators": (",", ":")}
    inner = {"header_crc32c": "00000000", **inner}
    fields = {"__metadata__": {"gaugekit": json.dumps(inner, **compact), **metadata}}
    for entry in entries:
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    raw = json.dumps(fields, **compact).encode()
    raw += b" " * ((length or len(raw) + -(len(raw) + 8) % 16) - len(raw))
    digits = b"%08x" % _header_crc32c(raw)
    return raw[: DIGITS.start] + digits + raw[DIGITS.stop :]


def render_packed(original: Header, stored: list[tuple[Entry, str, int]], length: int) -> bytes:
    """The header of a packed file, ``length`` bytes (0: as many as needed), from (entry, codec, crc32c) in
    data order.
    """
    inner = {
        "version": VERSION,
        "header": original.raw.decode(),
        "tensors": {entry.name: [codec, crc] for entry, codec, crc in stored},
    }
    return _render(inner, original.metadata or {}, (entry for entry, _, _ in stored), length)


def packed_header_bytes(original: Header) -> int | None:
    """Enough for the packed header whatever the coded sizes turn out to be; data then starts at a multiple of 16. None
    where such a header cannot be: it would be too long, or the original's metadata has an entry of that name.
    """
    if "gaugekit" in (original.metadata or {}):
        return None
    longest = original.file_bytes
    entries = [Entry(e.name, "U8", (*e.shape, longest), longest, longest) for e in original.entries]
    needed = len(render_packed(original, [(e, "rans", 0xFFFFFFFF) for e in entries], 0))
    return needed if needed <= MAX_HEADER_BYTES else None


def render_chained(original: Header, payload_bytes: int) -> bytes:
    """The header of a packed file of version 3, whose one tensor is the payload of all."""
    inner = {"version": CHAINED, "header": original.raw.decode(), "tensors": len(original.entries)}
    entry = Entry(CHAIN, "U8", (payload_bytes,), 0, payload_bytes)
    return _render(inner, original.metadata or {}, [entry], 0)


def render_bundled(original: Header, stored: list[tuple[Entry, str, int]]) -> tuple[bytes, bytes]:
    """(header, section behind the tensors) of a packed file of version 2; the tensors begin at ``bundle.START``."""
    numbers = {entry.name: number for number, entry in enumerate(original.entries)}
    coded = np.array([codec == "rans" for _, codec, _ in stored], bool)
    method, section = bundle.render(
        bundle.Section(
            original.raw,
            np.array([numbers[entry.name] for entry, _, _ in stored], np.uint32),
            coded,
            np.array([entry.size for entry, _, _ in stored], np.uint64),
            np.array([crc for _, _, crc in stored], np.uint32),
        )
    )
    end = stored[-1][0].end if stored else 0
    inner = {
        "version": BUNDLED,
        "header": [method, len(original.raw), crc32c(section)],
        "tensors": len(stored),
    }
    entries = (
        Entry(bundle.TENSORS, "U8", (end,), 0, end),
        Entry(bundle.HEADER, "U8", (len(section),), end, end + len(section)),
    )
    return _render(inner, {}, entries, bundle.START - 8), section


def _parse_packed(file: BinaryIO, raw: bytes, data_bytes: int) -> Packed:
    if raw[DIGITS] != b"%08x" % _header_crc32c(raw):
        raise CorruptFile("the header's checksum is wrong")
    listed = parse_header(raw, data_bytes)
    inner = parse_object(listed.metadata["gaugekit"], "the gaugekit entry")
    if inner.get("version") == CHAINED:
        return _parse_chained(listed, inner)
    if inner.get("version") == BUNDLED:
        packed = _parse_bundled(file, listed, inner)
    elif inner.get("version") == VERSION:
        packed = _parse_listed(listed, inner)
    else:
        raise CorruptFile(
            f"its version is {inner.get('version')!r}, this gaugekit reads {VERSION} to {CHAINED}"
        )
    by_name = {entry.name: entry for entry in packed.original.entries}
    if not set(packed.tensors) == set(by_name) == {entry.name for entry in packed.stored.entries}:
        raise CorruptFile("the original header, the codecs and the stored tensors do not agree on the names")
    for entry in packed.stored.entries:
        source, codec = by_name[entry.name], packed.tensors[entry.name][0]
        as_raw = (entry.dtype, entry.shape, entry.size) == (source.dtype, source.shape, source.size)
        as_blob = (entry.dtype, entry.shape) == ("U8", (entry.size,)) and codable(source.dtype)
        if not (as_raw if codec == "raw" else as_blob):
            raise CorruptFile(f"tensor {entry.name!r}: what is stored does not fit the original header")
    return packed


def _parse_listed(stored: Header, inner: dict) -> Packed:
    """Version 1: the file's own header lists the tensors."""
    if not isinstance(inner.get("header"), str) or not isinstance(inner.get("tensors"), dict):
        raise CorruptFile("the gaugekit entry lacks the original header or the tensors")
    original = parse_header(inner["header"].encode(errors="surrogatepass"))
    tensors = {}
    for name, value in inner["tensors"].items():
        if (
            not isinstance(value, list)
            or len(value) != 2
            or value[0] not in ("rans", "raw")
            or not natural(value[1])
        ):
            raise CorruptFile(f"tensor {name!r}: its codec is not one this version reads")
        tensors[name] = tuple(value)
    return Packed(stored, original, tensors)


def _parse_chained(stored: Header, inner: dict) -> Packed:
    """Version 3: one payload holds all tensors; it has checksums of its own."""
    if not isinstance(inner.get("header"), str):
        raise CorruptFile("the gaugekit entry lacks the original header")
    payload = [(entry.name, entry.dtype, entry.shape) for entry in stored.entries]
    if payload != [(CHAIN, "U8", (entry.size,)) for entry in stored.entries] or not payload:
        raise CorruptFile("what is stored is not one payload")
    original = parse_header(inner["header"].encode(errors="surrogatepass"))
    return Packed(stored, original, {entry.name: (CHAIN, 0) for entry in original.entries}, chained=True)


def _parse_bundled(file: BinaryIO, listed: Header, inner: dict) -> Packed:
    """Version 2: the header lists two sections, and the second one says what is in the first."""
    header, count = inner.get("header"), inner.get("tensors")
    sections = [entry.name for entry in listed.entries]
    if (
        not isinstance(header, list)
        or len(header) != 3
        or header[0] not in bundle.METHODS
        or not all(map(natural, (*header[1:], count)))
        or header[1] > MAX_HEADER_BYTES
        or sorted(sections) != [bundle.HEADER, bundle.TENSORS]
        or sections[-1] != bundle.HEADER
    ):
        raise CorruptFile("the gaugekit entry does not say where the original header and the tensors are")
    data, place = listed.entries
    file.seek(listed.data_start + place.begin)
    section = file.read(place.size)
    if len(section) != place.size or crc32c(section) != header[2]:
        raise CorruptFile("the checksum of the original header is wrong")
    parts = bundle.parse(header[0], section, header[1], count)
    original = parse_header(parts.header)
    if len(original.entries) != count:
        raise CorruptFile("the original header has another number of tensors than are stored")
    tensors, entries, cursor = {}, [], 0
    rows = zip(
        *(column.tolist() for column in (parts.order, parts.coded, parts.sizes, parts.crcs)), strict=True
    )
    for number, coded, size, crc in rows:
        entry = original.entries[number]
        size = size if coded else entry.size
        dtype, shape = ("U8", (size,)) if coded else (entry.dtype, entry.shape)
        tensors[entry.name] = ("rans" if coded else "raw", crc)
        entries.append(Entry(entry.name, dtype, shape, cursor, cursor + size))
        cursor += size
    if cursor != data.size:
        raise CorruptFile("the stored tensors do not fill their section")
    return Packed(Header(listed.raw, None, entries), original, tensors, place.size)
