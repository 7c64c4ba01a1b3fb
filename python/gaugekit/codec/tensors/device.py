"""Blobs to tensors on a GPU: packed bytes cross the bus, one launch decodes all of them where they are used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gaugekit.codec.tensors.blob import Buffer, as_byte_tensor
from gaugekit.ops.rans import operator as rans
from gaugekit.ops.rans.rows import ROW, decode_rows, rows_of

ALIGNMENT = 256  # of each tensor in the output, in bytes
GROUP_BYTES = 1 << 26  # packed bytes that travel at once while the ones before them are decoded


class DeviceDecoder:
    """Decodes ``blobs`` into ``tensors`` on ``device``; on the CPU lane by lane, which is slow and only a test.

    ``blobs``: coded blobs (anything with the buffer protocol, or uint8 tensors). ``ranges``: for each blob None (all of
    it, in its shape) or (start, stop), elements in row-major order. Everything that can be wrong with the bytes is
    checked here, on the host: CorruptFile. ``tensors``: views of one buffer, undefined before ``load`` or ``decode``.

    ``load()`` sends the bytes and decodes each group of tensors while the next one travels. ``upload()`` and then
    ``decode()``, one launch for all, do the same apart: ``decode`` may be captured in a CUDA graph and repeated. None
    of them waits for the GPU. ``check()`` does, and raises CorruptFile if a chunk did not decode as a sound one.
    """

    def __init__(self, blobs: Sequence[Buffer], device: torch.device | str,
                 ranges: Sequence[tuple[int, int] | None] | None = None):  # fmt: skip
        self.device = torch.device(device)
        ranges = [None] * len(blobs) if ranges is None else ranges
        if len(ranges) != len(blobs):
            raise ValueError(f"ranges: expected one for each of {len(blobs)} blobs, got {len(ranges)}")
        sources, parts, layout, place, out = [], [], [], 0, 0
        self._groups = []  # (bytes to send from, to; rows from, to)
        for blob, wanted in zip(blobs, ranges, strict=True):
            blob = as_byte_tensor(blob)
            dtype, shape = rans.open_blob(blob)
            start, stop = (0, shape.numel()) if wanted is None else wanted
            if not 0 <= start <= stop <= shape.numel():
                raise ValueError(f"ranges: expected 0 <= start <= stop <= {shape.numel()}, got {wanted}")
            done = sum(map(len, parts))
            parts.append(rows_of(blob, start, stop, place, out))
            self._extend_groups(place, place + blob.numel(), done, done + len(parts[-1]))
            layout.append((out, dtype, shape if wanted is None else torch.Size([stop - start])))
            sources.append(blob)
            place += blob.numel()
            out += -(-(stop - start) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        pinned = self.device.type == "cuda"
        self._host = torch.empty(place, dtype=torch.uint8, pin_memory=pinned)
        if sources:
            torch.cat(sources, out=self._host)
        table = np.concatenate(parts) if parts else np.zeros(0, ROW)
        self._rows = torch.from_numpy(table.view(np.uint8)).to(self.device)
        self._packed = torch.empty(place, dtype=torch.uint8, device=self.device)
        self._out = torch.empty(out, dtype=torch.uint8, device=self.device)
        self._damaged = torch.zeros(len(table), dtype=torch.int32, device=self.device)
        self.tensors = [
            self._out[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for at, dtype, shape in layout
        ]

    def _extend_groups(self, start: int, stop: int, first: int, last: int) -> None:
        if self._groups and stop - self._groups[-1][0] <= GROUP_BYTES:
            start, _, first, _ = self._groups.pop()
        self._groups.append((start, stop, first, last))

    def upload(self) -> None:
        """Sends all packed bytes to the device."""
        self._packed.copy_(self._host, non_blocking=True)

    def decode(self) -> list[torch.Tensor]:
        """Decodes all chunks in one launch on the current stream."""
        decode_rows(self._packed, self._rows, self._out, self._damaged)
        return self.tensors

    def load(self) -> list[torch.Tensor]:
        """Sends and decodes, group after group, each decoded while the next one travels."""
        if self.device.type != "cuda":
            self.upload()
            return self.decode()
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            for start, stop, first, last in self._groups:
                with torch.cuda.stream(side):
                    self._packed[start:stop].copy_(self._host[start:stop], non_blocking=True)
                current.wait_stream(side)
                chunks = self._rows[48 * first : 48 * last]
                decode_rows(self._packed, chunks, self._out, self._damaged[first:last])
        return self.tensors

    def check(self) -> None:
        """Waits for the device; CorruptFile if a chunk did not decode as a sound one."""
        if self._damaged.any():
            raise rans.CorruptFile("not a sound coded blob: a chunk does not decode to its end")
