"""One block of a key/value cache to bytes and back: a header that seals it, the tables or their name, a coded blob."""

from __future__ import annotations

import hashlib
import itertools
import struct
import threading

import numpy as np
import torch

from gaugekit.codec.kv.tables import AXES, KVTables, check_axes
from gaugekit.codec.tensors import blob as coded
from gaugekit.codec.tensors import fixed
from gaugekit.codec.tensors.blob import Buffer, as_byte_tensor
from gaugekit.coder.header import padded, sealed, unsealed
from gaugekit.ops.rans import operator as rans
from gaugekit.ops.rans.operator import CorruptFile

MAGIC, VERSION = b"GKKVBK\x1a\n", 1
# magic, version, layout, place of the axes in ORDERS, bytes of the tables, their digest, bytes of the payload, digest
# of the key, crc32c of what follows (of the tables alone where the payload has its own), the header's crc32c
FIELDS = struct.Struct("<8sHBBIQQ24sII")
LAYOUTS = {"rans": 1, "fixed": 2}
# every order of axes there can be; a block names its own by its place here
ORDERS = sorted(
    "".join(order)
    for count in range(2, 6)
    for order in itertools.permutations(AXES, count)
    if {"S", "D"} <= set(order)
)
KEY_BYTES = 24
MOST_TABLES = 32  # tables are put into a block where they take at most one part in this many of it
_scratch = threading.local()


def key_digest(key: str | bytes) -> bytes:
    """The 24 bytes that stand for ``key`` in a block and in its file's name; ValueError for an empty or other key."""
    data = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
    if not isinstance(data, bytes) or not data:
        raise ValueError(f"key: expected a string or bytes, not empty, got {key!r}")
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


class KVCodec:
    """Blocks of a key/value cache to bytes and back, bit for bit, any number of threads at once.

    ``axes`` names a block's dimensions (``KVTables.calibrate``). ``tables`` are those of its layers; without them the
    exponents are coded as they are. ``embed`` puts the tables into every block, which then needs no others to be
    decoded; blocks of so few tokens that the tables would be more than a thirty-second of them are coded without.
    ``layout`` and ``symbols`` are those of ``gaugekit.codec.encode``: "rans" is the smallest, "fixed" (bfloat16 and
    float16) simpler to decode.
    """

    def __init__(
        self,
        axes: str = "PLSD",
        *,
        tables: KVTables | None = None,
        layout: str = "rans",
        symbols: str | None = None,
        embed: bool = False,
    ):
        check_axes(axes)
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {tuple(LAYOUTS)}, got {layout!r}")
        if symbols is not None and layout == "fixed":
            raise ValueError("symbols: expected None with layout='fixed', which has none")
        self.axes, self.tables, self.layout, self.symbols, self.embed = axes, tables, layout, symbols, embed
        self._embedded: KVTables | None = None

    def encode(self, block: torch.Tensor, key: str | bytes | None = None) -> torch.Tensor:
        """``block`` (on the CPU, any strides and bits) as uint8 [bytes].

        ``key``, where it is given, is sealed into the block, and has to be given to decode it. ValueError for a dtype
        that ``gaugekit.codec.encode`` does not take, or dimensions that are not those of ``axes`` or the tables.
        """
        check_block(block)
        check_axes(self.axes, block.dim())
        if block.device.type != "cpu":
            raise ValueError(f"block: expected one on the CPU, got one on {block.device}")
        block, tables = block.detach().resolve_neg().contiguous(), self.tables
        section = b""
        if tables is not None and self.embed:
            section = tables.to_bytes()
            if MOST_TABLES * len(section) > block.nbytes:
                section, tables = b"", None
        if tables is not None:
            moved = _room(block)
            tables.add_to(block, self.axes, moved)
            block = moved
        begin = FIELDS.size + padded(len(section))
        if self.layout == "rans":
            data = coded.encode_bytes(block, symbols=self.symbols, front=begin)
        else:
            data = torch.cat([torch.empty(begin, dtype=torch.uint8), fixed.encode(block)])
        digest = 0 if tables is None else tables.digest
        kind = (LAYOUTS[self.layout], ORDERS.index(self.axes), len(section), digest)
        _seal(data, kind, section, _stored(key))
        return data

    def decode(
        self, data: Buffer, out: torch.Tensor | None = None, key: str | bytes | None = None
    ) -> torch.Tensor:
        """The block that ``data`` was made from, in ``out`` where one is given.

        Every byte of ``data`` is covered by a checksum, and every element by another where the layout is "rans".
        CorruptFile for damage, for a block of another key, and where the tables it was coded with are not at hand;
        ValueError for an ``out`` that is not a contiguous tensor of its dtype and shape. After an error the contents of
        ``out`` are undefined.
        """
        data = as_byte_tensor(data)
        kind, payload = _unsealed(data, _stored(key))
        layout, axes, section_bytes, digest = kind
        tables = self._tables(digest, data[FIELDS.size : FIELDS.size + section_bytes])
        if layout == LAYOUTS["rans"]:
            block = coded.decode(payload, out)
        else:
            if out is not None:
                coded.check_target(out, *fixed.described(payload))
            block = fixed.decode(payload)
        if tables is not None:
            if block.dim() != len(ORDERS[axes]) or not tables.fits(block, ORDERS[axes]):
                raise CorruptFile("not a sound key/value block: its tables are not those of its shape")
            tables.take_from(block, ORDERS[axes])
        return block if layout == LAYOUTS["rans"] or out is None else out.copy_(block)

    def most_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """No block of this shape and dtype is ever coded in more bytes."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        tables = padded(size // MOST_TABLES) if self.embed else 0
        if self.layout == "rans":  # a chunk stored as it is, with its place in the index
            return FIELDS.size + tables + 64 + padded(8 * len(shape)) + size + 64 * (1 + (count >> 14))
        rows = -(-count // fixed.ROW)
        # every element an escape beside its code and its sign and mantissa
        return FIELDS.size + tables + 256 + padded(8 * len(shape)) + rows * (3 * fixed.ROW + 64)

    def _tables(self, digest: int, section: torch.Tensor) -> KVTables | None:
        """The tables of that digest; None for 0, which stands for none."""
        if not digest:
            return None
        for tables in (self.tables, self._embedded):
            if tables is not None and tables.digest == digest:
                return tables
        if not section.numel():
            raise CorruptFile(
                f"its tables ({digest:016x}) are not at hand: give the codec those it was coded with"
            )
        tables = KVTables.from_bytes(section.numpy().tobytes())
        if tables.digest != digest:
            raise CorruptFile("not a sound key/value block: the digest of its tables is wrong")
        self._embedded = tables  # the next block has the same ones
        return tables


def check_block(block: object) -> None:
    """ValueError unless ``block`` is a tensor whose elements lie in memory."""
    if not isinstance(block, torch.Tensor) or block.layout != torch.strided:
        kind = block.layout if isinstance(block, torch.Tensor) else type(block).__name__
        raise ValueError(f"block: expected a torch.Tensor, dense, got {kind}")


def described(data: torch.Tensor) -> tuple[int, torch.dtype, torch.Size]:
    """(bytes, dtype, shape) of the block that uint8 ``data`` begins with, by its headers; CorruptFile."""
    kind, size, *_ = _header(data)
    begin = FIELDS.size + padded(kind[2])
    payload = data[begin : begin + size]
    if payload.numel() != size:
        raise CorruptFile("not a sound key/value block: it is cut short")
    if kind[0] == LAYOUTS["fixed"]:
        if not fixed.is_fixed(payload):
            raise CorruptFile("not a sound key/value block: its payload is of the other layout")
        return begin + size, *fixed.described(payload)
    return begin + size, *rans.open_blob(payload)


def _room(block: torch.Tensor) -> torch.Tensor:
    """Memory of this thread for a block of its shape and dtype, which the next call takes again."""
    held = getattr(_scratch, "bytes", None)
    if held is None or held.numel() < block.nbytes or held.numel() > 4 * block.nbytes:
        held = _scratch.bytes = torch.empty(block.nbytes, dtype=torch.uint8)
    return held[: block.nbytes].view(block.dtype).view(block.shape)


def _stored(key: str | bytes | None) -> bytes:
    return bytes(KEY_BYTES) if key is None else key_digest(key)


def _seal(data: torch.Tensor, kind: tuple[int, int, int, int], section: bytes, key: bytes) -> None:
    """Writes what stands before the payload of a block, uint8 ``data``: the header and ``section``, the tables.

    ``kind``: the layout, the number of the axes, bytes of the tables, their digest.
    """
    begin = FIELDS.size + padded(len(section))
    front = data[:begin].numpy()
    front[FIELDS.size :] = 0
    front[FIELDS.size : FIELDS.size + len(section)] = np.frombuffer(section, np.uint8)
    fields = [MAGIC, VERSION, *kind, data.numel() - begin, key, _checksum(data, kind[0], begin)]
    front[: FIELDS.size] = np.frombuffer(sealed(FIELDS, fields, ()), np.uint8)


def _header(data: torch.Tensor) -> tuple[tuple[int, int, int, int], int, bytes, int]:
    """(kind as in ``_seal``, bytes of the payload, key, checksum) of the block that ``data`` begins with."""
    head = data[: FIELDS.size].numpy().tobytes()
    if len(head) < FIELDS.size or not head.startswith(MAGIC):
        raise CorruptFile("not a sound key/value block: it is cut short, or something else")
    if unsealed(FIELDS, head, 0) is None:
        raise CorruptFile("not a sound key/value block: the header's checksum is wrong")
    _, version, *kind, size, key, crc, _ = FIELDS.unpack(head)
    if version != VERSION or kind[0] not in LAYOUTS.values() or kind[1] >= len(ORDERS):
        raise CorruptFile("not a sound key/value block: not of a version this one reads")
    return tuple(kind), size, key, crc


def _unsealed(data: torch.Tensor, key: bytes) -> tuple[tuple[int, int, int, int], torch.Tensor]:
    """(kind as in ``_seal``, payload) of a block, its header and checksum verified."""
    kind, size, stored_key, crc = _header(data)
    begin = FIELDS.size + padded(kind[2])
    if begin + size != data.numel():
        raise CorruptFile("not a sound key/value block: its length is not the sum of its parts")
    if stored_key != key:
        raise CorruptFile("not the block that was asked for: it was coded under another key")
    if _checksum(data, kind[0], begin) != crc:
        raise CorruptFile("not a sound key/value block: the checksum of its bytes is wrong")
    if fixed.is_fixed(data[begin:]) != (kind[0] == LAYOUTS["fixed"]):
        raise CorruptFile("not a sound key/value block: its payload is of the other layout")
    return kind, data[begin:]


def _checksum(data: torch.Tensor, layout: int, begin: int) -> int:
    """Of all that follows the header; a transfer blob, from ``begin`` on, has a checksum of its own over every byte."""
    covered = data[FIELDS.size :] if layout == LAYOUTS["rans"] else data[FIELDS.size : begin]
    return rans.crc32c(covered) if covered.numel() else 0
