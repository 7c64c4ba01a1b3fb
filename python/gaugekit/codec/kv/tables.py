"""Where each channel's exponents lie: measured once, for every layer, keys and values apart.

A channel of a cache keeps its size from token to token, and channels differ. Adding one number to a channel's exponents
brings them to the place where all others are, so that one table of the coder fits every layer. It is added to the
element's bits as an integer, wrapping around: any bits come back by subtraction, zeros, infinities and NaN too.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from gaugekit.codec.tensors.blob import as_byte_tensor
from gaugekit.coder.header import sealed, unsealed
from gaugekit.files.durable import written
from gaugekit.files.places import naming_file
from gaugekit.ops.rans import operator as rans
from gaugekit.ops.rans.operator import ELEMENTS, CorruptFile

MAGIC, VERSION = b"GKKVTB\x1a\n", 1
# magic, version, element, 0, rank, zeros, crc32c of the shifts, the header's crc32c
FIELDS = struct.Struct("<8sHBBB11xII")
# bits of the mantissa, bits of the exponent, and the exponent that all channels are brought to
EXPONENTS = {
    torch.bfloat16: (7, 8, 127),
    torch.float16: (10, 5, 15),
    torch.float32: (23, 8, 127),
    torch.float8_e4m3fn: (3, 4, 7),
    torch.float8_e5m2: (2, 5, 15),
}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
AXES = "PLSGD"


def check_axes(axes: str, rank: int | None = None) -> None:
    """ValueError unless ``axes`` are letters of PLSGD, none twice, with S and D, and as many as ``rank``."""
    if len(set(axes)) != len(axes) or not {"S", "D"} <= set(axes) <= set(AXES):
        raise ValueError(
            f"axes: expected letters of {AXES}, each once, S and D among them, such as 'PLSD', got {axes!r}"
        )
    if rank is not None and rank != len(axes):
        raise ValueError(f"block: expected {len(axes)} dimensions ({axes}), got {rank}")


def _ordered(block: torch.Tensor, axes: str) -> torch.Tensor:
    """A view [P, L, S, G, D]; absent axes have size 1."""
    check_axes(axes, block.dim())
    view = block.permute([axes.index(letter) for letter in AXES if letter in axes])
    for place, letter in enumerate(AXES):
        if letter not in axes:
            view = view.unsqueeze(place)
    return view


class KVTables:
    """What is added to the exponents of each channel: ``shifts`` int8 [P, L, C].

    P is 2 where keys and values lie in one block, keys first, else 1; L layers; C channels, of all key/value heads.
    ``dtype`` is the elements' type. ``digest`` (64 bits) names these tables in every block coded with them.
    """

    def __init__(self, shifts: torch.Tensor, dtype: torch.dtype):
        if dtype not in EXPONENTS:
            expected = ", ".join(str(kind).removeprefix("torch.") for kind in EXPONENTS)
            raise ValueError(f"dtype: expected one of {expected}, got {dtype}")
        if shifts.dtype != torch.int8 or shifts.dim() != 3 or shifts.device.type != "cpu":
            raise ValueError(
                f"shifts: expected int8 [P, L, C] on the CPU, got {shifts.dtype} {list(shifts.shape)}"
            )
        self.shifts, self.dtype = shifts.contiguous(), dtype
        self._views: dict[tuple, torch.Tensor] = {}
        self._bytes = self._rendered()
        self.digest = int.from_bytes(hashlib.sha256(self._bytes).digest()[:8], "little") or 1

    @classmethod
    def calibrate(cls, blocks: torch.Tensor | Iterable[torch.Tensor], axes: str = "PLSD") -> KVTables:
        """Tables that bring each channel's median exponent to the same place, from one block or several.

        A block is a float tensor on the CPU whose dimensions ``axes`` names: P keys and values, L layers, S tokens, G
        key/value heads, D channels of a head, or of all heads where there is no G. P, L and G may be absent. Elements
        that are zero or subnormal do not count. A few hundred tokens of any text are enough.
        ValueError for no blocks, other dtypes, or blocks that differ in more than their tokens.
        """
        counts = dtype = shape = None
        for block in [blocks] if isinstance(blocks, torch.Tensor) else blocks:
            if block.dtype not in EXPONENTS or block.device.type != "cpu":
                expected = ", ".join(str(kind).removeprefix("torch.") for kind in EXPONENTS)
                raise ValueError(
                    f"blocks: expected one of {expected} on the CPU, got {block.dtype} on {block.device}"
                )
            view = _ordered(block.detach(), axes)
            parts, layers, _, heads, width = view.shape
            kind = (block.dtype, parts, layers, heads * width)
            if counts is None:
                dtype, shape = block.dtype, kind
                counts = torch.zeros(
                    parts, layers, heads * width, 1 << EXPONENTS[dtype][1], dtype=torch.int32
                )
            elif kind != shape:
                raise ValueError(f"blocks: expected (dtype, P, L, channels) {shape} in all, got {kind}")
            _count(view, dtype, counts)
        if counts is None:
            raise ValueError("blocks: expected at least one block, got none")
        return cls(_shifts(counts, EXPONENTS[dtype][2]), dtype)

    def add_to(self, block: torch.Tensor, axes: str, out: torch.Tensor) -> None:
        """The bits of ``block`` with its exponents brought to one place, into ``out``, its dtype and shape."""
        shifts, tokens = self._view(block, axes), axes.index("S")
        rows = (shifts.shape[:tokens].numel(), block.shape[tokens], shifts.shape[tokens + 1 :].numel())
        data, moved = (x.view(shifts.dtype).view(rows) for x in (block, out))
        rans.shift_rows(data, shifts.view(rows[0], rows[2]), moved)

    def take_from(self, block: torch.Tensor, axes: str) -> None:
        """Undoes ``add_to``, in place."""
        shifts = self._view(block, axes)
        block.view(shifts.dtype).sub_(shifts)

    def fits(self, block: torch.Tensor, axes: str) -> bool:
        """Whether the dtype, parts, layers and channels are those of ``block``."""
        parts, layers, _, heads, width = _ordered(block, axes).shape
        return block.dtype == self.dtype and self.shifts.shape == (parts, layers, heads * width)

    def _view(self, block: torch.Tensor, axes: str) -> torch.Tensor:
        """The shifts as integers of the block's width, in the order of its axes."""
        parts, layers, _, heads, width = _ordered(block, axes).shape
        if not self.fits(block, axes):
            raise ValueError(
                f"block: expected {self.dtype} with (P, L, channels) {tuple(self.shifts.shape)} as in the tables, "
                f"got {block.dtype} with {(parts, layers, heads * width)}"
            )
        key = (axes, heads)
        if key not in self._views:
            shifts = self.shifts.to(INTEGERS[self.dtype.itemsize]) << EXPONENTS[self.dtype][0]
            shifts = shifts.view(parts, layers, 1, heads, width)
            shifts = shifts.permute(
                [AXES.index(letter) for letter in axes]
                + [place for place, letter in enumerate(AXES) if letter not in axes]
            )
            self._views[key] = shifts.reshape(shifts.shape[: len(axes)]).contiguous()
        return self._views[key]

    def to_bytes(self) -> bytes:
        """A header with checksums, and the shifts: docs/format.md."""
        return self._bytes

    def _rendered(self) -> bytes:
        body = self.shifts.numpy().tobytes()
        crc = rans.crc32c(as_byte_tensor(body)) if body else 0
        values = [MAGIC, VERSION, ELEMENTS[self.dtype], 0, 3, crc]
        return sealed(FIELDS, values, self.shifts.shape) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> KVTables:
        """What ``to_bytes`` gave; CorruptFile for anything else."""
        begin = FIELDS.size + 32  # three dimensions, padded
        if len(data) < begin or not data.startswith(MAGIC):
            raise CorruptFile("not sound tables of a key/value cache: they are cut short, or something else")
        _, version, element, zero, rank, crc, _ = FIELDS.unpack(data[: FIELDS.size])
        dtypes = [dtype for dtype in EXPONENTS if ELEMENTS[dtype] == element]
        if version != VERSION or zero or rank != 3 or not dtypes:
            raise CorruptFile("not sound tables of a key/value cache: not of a version this one reads")
        shape = unsealed(FIELDS, data[:begin], rank)
        if shape is None:
            raise CorruptFile("not sound tables of a key/value cache: the header's checksum is wrong")
        body = np.frombuffer(data, np.uint8)[begin:].copy()
        if body.size != shape[0] * shape[1] * shape[2] or (
            body.size and rans.crc32c(torch.from_numpy(body)) != crc
        ):
            raise CorruptFile(
                "not sound tables of a key/value cache: the shifts' checksum or number is wrong"
            )
        return cls(torch.from_numpy(body.view(np.int8)).view(shape), dtypes[0])

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``to_bytes``: on the disk and whole when this returns, or not there."""
        with written(Path(path)) as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike) -> KVTables:
        """What ``save`` wrote; CorruptFile, naming the file, where it is damaged."""
        with naming_file(path), open(path, "rb") as file:
            data = file.read()
        try:
            return cls.from_bytes(data)
        except CorruptFile as error:
            raise CorruptFile(f"{os.fspath(path)}: {error}") from None


def _count(view: torch.Tensor, dtype: torch.dtype, counts: torch.Tensor) -> None:
    """Adds to counts [P, L, C, exponents] how often each exponent occurs in view [P, L, S, G, D]."""
    mantissa, bits, _ = EXPONENTS[dtype]
    channels, exponents = counts.shape[2:]
    offsets = (torch.arange(channels) * exponents).view(view.shape[3:])
    for part in range(view.shape[0]):
        for layer in range(view.shape[1]):
            integers = view[part, layer].contiguous().view(INTEGERS[dtype.itemsize]).to(torch.int32)
            places = (integers >> mantissa & (1 << bits) - 1) + offsets
            occurrences = torch.bincount(places.flatten(), minlength=channels * exponents)
            counts[part, layer] += occurrences.view(channels, exponents).to(torch.int32)


def _shifts(counts: torch.Tensor, centre: int) -> torch.Tensor:
    """centre − the median exponent of counts [P, L, C, exponents]; 0 for channels that are zero throughout."""
    counts = counts.clone()
    counts[..., 0] = 0
    sums = counts.cumsum(-1)
    total = sums[..., -1:]
    median = (2 * sums < total).sum(-1)
    shifts = torch.where(total[..., 0] > 0, centre - median, 0)
    return shifts.clamp(-128, 127).to(torch.int8)
