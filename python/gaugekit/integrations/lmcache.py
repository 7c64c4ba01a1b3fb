"""LMCache's blocks without loss in fewer bytes: ``"serde": {"type": "gaugekit"}`` on any of its L2 adapters.

LMCache knows a serde once it was registered in its process: ``register()``, or its server started by ``python -m
gaugekit.integrations.lmcache server …``, which registers it and hands over to LMCache's own command. Each block carries
its tables, so that any host can decode it. Interface: ``lmcache.v1.distributed.serde`` of LMCache 0.5.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gaugekit.codec.kv.block import KVCodec, described
from gaugekit.codec.kv.store import CALIBRATION_TOKENS
from gaugekit.codec.kv.tables import EXPONENTS, KVTables
from gaugekit.ops.rans.operator import SYMBOLS, CorruptFile

NAME = "gaugekit"
# LMCache's memory formats whose dimensions are known; any other has those of the serde's "axes", or is coded flat
FORMATS = {"KV_2LTD": "PLSD", "KV_MLA_FMT": "PLSD", "KV_T2D": "SPD", "KV_2TD": "PSD"}
OPTIONS = {"layout", "symbols", "axes", "room", "max_workers"}
# Several of LMCache's adapters (files, Valkey, Bigtable) load an object only into a buffer of just its length, which
# the serde has to know before it sees one: so each takes the same part of its plain bytes, filled up.
ROOM = {torch.bfloat16: 0.75, torch.float16: 0.9}
ROOM_BYTES = 2048  # beside it, for headers


class KVSerializer:
    """LMCache's ``Serializer``: a memory object's tensors as blocks one behind the other, each with its tables.

    Every object of a shape takes the same bytes: ``room`` times its plain ones, by default 0.75 for bfloat16, 0.9 for
    float16 and what the worst bits need for others; one that does not fit is refused, and LMCache does not store it.
    With ``room`` 0 each takes what it needs, for adapters that load objects shorter than their buffer.
    The tables are calibrated on the first object of its kind (format, dtype, layers, channels) with 16 tokens or more.
    Tensors of dtypes the codec does not know are coded as bytes.
    """

    def __init__(
        self, axes: str = "PLSD", layout: str = "rans", symbols: str | None = None, room: float | None = None
    ):
        if room is not None and not 0 <= room <= 1:
            raise ValueError(f"room: expected 0 to 1, got {room!r}")
        self._axes, self._layout, self._symbols, self._room = axes, layout, symbols, room
        self._flat = KVCodec("SD")
        self._codecs: dict[tuple, KVCodec] = {}
        self._turn = threading.Lock()
        KVCodec(axes, layout=layout, symbols=symbols)  # says what is wrong with them now

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        """Bytes written into ``dst``, a buffer of ``estimate_serialized_size`` or more; ``key`` is not looked at."""
        buffer, tensors = _flat_bytes(dst.tensor), _tensors(src)
        size = self._size([(tensor.shape, tensor.dtype) for tensor in tensors])
        if buffer.numel() < size:
            raise ValueError(f"dst: expected {size} bytes or more, got {buffer.numel()}")
        end = 0
        for tensor in tensors:
            data = self._encoded(tensor, _axes_of(src, tensor, self._axes))
            if end + data.numel() > size:
                raise ValueError(
                    f"src: expected an object that takes at most {size} bytes (room), got a larger one"
                )
            buffer[end : end + data.numel()] = data
            end += data.numel()
        if self._room == 0:
            return end
        buffer[end:size] = 0
        return size

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """The bytes of such an object; with ``room`` 0 an upper bound."""
        return self._size(zip(layout_desc.shapes, layout_desc.dtypes, strict=True))

    def _size(self, kinds: Iterable[tuple[Sequence[int], torch.dtype]]) -> int:
        total = 0
        for shape, dtype in kinds:
            layouts = {"rans", self._layout}
            most = max(
                KVCodec(layout=layout, embed=True).most_bytes(tuple(shape), dtype) for layout in layouts
            )
            room = ROOM.get(dtype, 0) if self._room is None else self._room
            plain = torch.Size(shape).numel() * dtype.itemsize
            total += min(most, int(room * plain) + ROOM_BYTES) if room else most
        return total

    def _encoded(self, tensor: torch.Tensor, axes: str | None) -> torch.Tensor:
        if axes is None or tensor.dtype not in EXPONENTS:
            return self._flat.encode(_known(tensor))
        kind = (
            axes,
            tensor.dtype,
            *(size for size, letter in zip(tensor.shape, axes, strict=True) if letter != "S"),
        )
        codec = self._codecs.get(kind)
        if codec is None:
            layout = self._layout if tensor.dtype in (torch.bfloat16, torch.float16) else "rans"
            symbols = self._symbols if self._symbols in SYMBOLS[tensor.dtype] else None
            codec = KVCodec(axes, layout=layout, symbols=symbols, embed=True)
            if tensor.shape[axes.index("S")] < CALIBRATION_TOKENS:
                return codec.encode(tensor)
            codec.tables = KVTables.calibrate(tensor, axes)
            with self._turn:
                codec = self._codecs.setdefault(kind, codec)
        return codec.encode(tensor)


class KVDeserializer:
    """LMCache's ``Deserializer``. An error fails LMCache's task, which then computes the tokens anew."""

    def __init__(self) -> None:
        self._codec = KVCodec()

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        """Fills ``dst`` with the object that ``src`` begins with; bytes behind it are not looked at.

        CorruptFile where a byte is damaged, or the blocks are of another shape than ``dst``, which is then undefined.
        """
        data = _flat_bytes(src.tensor)
        for tensor in _tensors(dst):
            size, dtype, shape = described(data)
            out = tensor if tensor.dtype in SYMBOLS else tensor.view(-1).view(torch.int8)
            if (dtype, shape.numel()) != (out.dtype, out.numel()):
                raise CorruptFile(
                    f"not the block of this object: it is {dtype} {list(shape)}, expected {out.dtype} {list(out.shape)}"
                )
            self._codec.decode(data[:size], out.view(shape))
            data = data[size:]


def _known(tensor: torch.Tensor) -> torch.Tensor:
    """[1, elements]: of a dtype the codec does not know, as int8."""
    flat = tensor.contiguous().view(-1)
    return (flat if flat.dtype in SYMBOLS else flat.view(torch.int8)).view(1, -1)


def _flat_bytes(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("src, dst: expected memory objects with a tensor")
    return tensor.view(-1).view(torch.uint8)


def _tensors(memory: Any) -> list[torch.Tensor]:
    """The tensors of a memory object: one, or one for each of its groups."""
    shapes = memory.metadata.shapes
    tensors = [memory.tensor] if not shapes else [memory.get_tensor(place) for place in range(len(shapes))]
    if any(tensor is None for tensor in tensors):
        raise ValueError("src, dst: expected memory objects with a tensor")
    return tensors


def _axes_of(memory: Any, tensor: torch.Tensor, otherwise: str) -> str | None:
    """The axes of an object's tensor, None where they cannot be told."""
    axes = FORMATS.get(getattr(memory.get_memory_format(), "name", ""), otherwise)
    return axes if len(axes) == tensor.dim() else None


def register() -> None:
    """Makes the serde "gaugekit" known to LMCache in this process; a second call changes nothing.

    Its options, beside "type": "layout" and "symbols" as ``gaugekit.codec.encode`` has them, "axes" (PLSD) of memory
    whose format does not say them, "room" as ``KVSerializer`` has it, and "max_workers" threads (1). ImportError
    without LMCache.
    """
    from lmcache.v1.distributed import serde

    if NAME in serde.get_registered_serde_types():
        return

    class GaugekitSerializer(KVSerializer, serde.Serializer):
        pass

    class GaugekitDeserializer(KVDeserializer, serde.Deserializer):
        pass

    def create(options: dict[str, Any]) -> serde.SerdeProcessor:
        if unknown := sorted(set(options) - OPTIONS):
            raise ValueError(f"serde: expected options {sorted(OPTIONS)}, got {unknown}")
        workers = options.pop("max_workers", 1) if "max_workers" in (options := dict(options)) else 1
        return serde.AsyncSerdeProcessor(
            GaugekitSerializer(**options), GaugekitDeserializer(), max_workers=workers
        )

    serde.register_serde_factory(NAME, create)


def main(arguments: Sequence[str] | None = None) -> None:
    """LMCache's command, with the serde registered."""
    register()
    from lmcache.cli.main import main as lmcache

    lmcache(sys.argv[1:] if arguments is None else list(arguments))


if __name__ == "__main__":
    main()
