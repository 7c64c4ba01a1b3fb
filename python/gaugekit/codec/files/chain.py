"""Packed files whose tensors were coded together by ``codec.bitsback``: written whole, and decoded whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from gaugekit.codec.bitsback import Coupling, Group, ModelReport, decode, encode, weights
from gaugekit.codec.bitsback.model import Progress, finite
from gaugekit.codec.files import container, header
from gaugekit.codec.files.container import CorruptFile, Packed
from gaugekit.codec.files.header import Entry
from gaugekit.codec.tensors.dtypes import DTYPES, NAMES
from gaugekit.codec.tensors.pieces import read_at
from gaugekit.files.durable import written
from gaugekit.files.places import check_place, check_space, placed


class Chain:
    """The tensors of a chained file, all decoded when the first is asked for, then kept: each needs those coded later.

    Any thread may ask. CorruptFile where the payload is damaged, or holds other tensors than the header says.
    """

    def __init__(self, file: BinaryIO, packed: Packed):
        self._file, self._packed = file, packed
        self._tensors: dict[str, torch.Tensor] | None = None
        self._turn = threading.Lock()

    def tensor(self, entry: Entry) -> torch.Tensor:
        """One of them."""
        with self._turn:
            if self._tensors is None:
                self._tensors = self._decoded()
        return self._tensors[entry.name]

    def plain(self) -> Iterator[np.ndarray]:
        """The bytes of all of them, in the order in which the original stores them."""
        for entry in self._packed.original.entries:
            yield self.tensor(entry).contiguous().reshape(-1).view(torch.uint8).numpy()

    def _decoded(self) -> dict[str, torch.Tensor]:
        stored = self._packed.stored
        tensors = decode(torch.from_numpy(read_at(self._file, stored.data_start, stored.data_bytes)))
        entries = self._packed.original.entries
        expected = {entry.name: (DTYPES.get(entry.dtype), entry.shape) for entry in entries}
        tensors = weights.listed(tensors, {name: dtype for name, (dtype, _) in expected.items()})
        if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != expected:
            raise CorruptFile("its payload holds other tensors than its header says")
        return tensors


def save_chain(
    path: Path,
    groups: list[Group],
    others: dict[str, torch.Tensor],
    couplings: list[Coupling],
    metadata: dict[str, str] | None = None,
    progress: Progress | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[ModelReport, int]:
    """Codes a sliced model into the packed file ``path``: (what its rotations came to, the bytes of the file).

    ``groups``, ``others`` and ``couplings`` as ``codec.bitsback.encode`` takes them. The file is written beside its
    place, flushed and renamed; ``unpack`` of it gives the .safetensors file of its tensors. With ``dtype``, whatever is
    coded as int8 with scales is listed and read as one tensor of that dtype; ValueError where it has no room for one.
    """
    check_place(path)
    path = placed(path)
    payload, report = encode(groups, others, couplings, progress)
    tensors = decode(payload)  # proves the message, and says which tensors stand in it
    if dtype is not None:
        scaled = {name for name in tensors if weights.scale_name(name) in tensors}
        scales = {weights.scale_name(name) for name in scaled}
        kept = {
            name: dtype if name in scaled else t.dtype for name, t in tensors.items() if name not in scales
        }
        tensors = weights.listed(tensors, kept)
        for name in sorted(scaled):
            if not finite(tensors[name]):
                raise ValueError(f"{name}: its integers times their scales are beyond {dtype}")
    raw = header.render_plain(
        {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}, metadata
    )
    front = container.render_chained(header.parse_header(raw), payload.numel())
    size = 8 + len(front) + payload.numel()
    check_space(path, size)
    with written(path) as out:
        out.write(len(front).to_bytes(8, "little") + front)
        out.write(payload.numpy().data)
    return report, size
