"""``gaugekit::rans_*`` and ``gaugekit::crc32c``: exact bytes in, exact bytes out; no autograd, the same bits
everywhere.

A coded blob is docs/format.md's: 64 interleaved rANS lanes over one byte of each element (of "exponent-and-mantissa",
ten bits), the others stored raw.
"""

from __future__ import annotations

import torch

from gaugekit import _library
from gaugekit.coder import composition, encoder
from gaugekit.coder.blob import ELEMENTS as CODABLE
from gaugekit.coder.blob import KINDS, CorruptFile, checked  # noqa: F401 - whoever calls these catches CorruptFile
from gaugekit.coder.crc32c import crc32c as composed_crc32c

# what the format says of the elements, by torch's types of them
ELEMENTS = {getattr(torch, element.torch): element.number for element in CODABLE.values()}
DTYPES = {element: dtype for dtype, element in ELEMENTS.items()}
SYMBOLS = {getattr(torch, element.torch): element.symbols for element in CODABLE.values()}


def _encode(data, shape, element, kind, chunk_log2, path=-1, front=0):
    blob = encoder.encode(data.numpy(), tuple(shape.tolist()), element, kind, chunk_log2)
    return torch.cat([torch.empty(front, dtype=torch.uint8), torch.from_numpy(blob)])


def _open(blob):
    opened = composition.open_blob(blob.numpy())
    return torch.tensor([opened.element, opened.kind, opened.chunk_log2, opened.count, *opened.shape])


def _decode(blob, start, stop, out, path=-1):
    composition.decode(blob.numpy(), start, stop, out.numpy())


def _crc32c(data, crc=0):
    return torch.tensor(composed_crc32c(data.numpy(), crc))


def _shift(data, shifts, out):
    torch.add(data, shifts[:, None], out=out)


def _unbacked():
    return torch.library.get_ctx().new_dynamic_size()


_library.define(
    "rans_encode(Tensor data, Tensor shape, int element, int kind, int chunk_log2, int path=-1, int front=0) -> Tensor",
    _encode,
    lambda data, shape, element, kind, chunk_log2, path=-1, front=0: data.new_empty((_unbacked(),)),
)
_library.define(
    "rans_open(Tensor blob) -> Tensor", _open, lambda blob: blob.new_empty((_unbacked(),), dtype=torch.int64)
)
_library.define(
    "rans_decode(Tensor blob, int start, int stop, Tensor(a!) out, int path=-1) -> ()",
    _decode,
    lambda blob, start, stop, out, path=-1: None,
)
_library.define(
    "crc32c(Tensor data, int crc=0) -> Tensor",
    _crc32c,
    lambda data, crc=0: data.new_empty((), dtype=torch.int64),
)
_library.define(
    "shift_rows(Tensor data, Tensor shifts, Tensor(a!) out) -> ()",
    _shift,
    lambda data, shifts, out: None,
)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def encode(
    tensor: torch.Tensor, symbols: str, chunk_log2: int, path: int = -1, front: int = 0
) -> torch.Tensor:
    """The coded blob [bytes] uint8 of a CPU tensor of one of ``SYMBOLS``' dtypes, of any shape and strides, behind
    ``front`` bytes (a multiple of 16) that the caller fills.

    ``symbols`` are "exponent", "high-byte" or "exponent-and-mantissa" (the exponent and the two highest mantissa
    bits), ``chunk_log2`` is 14 to 20. ``path`` (of the C++ code: 0 portable, 1 AVX2, 2 AVX-512, 3 with VBMI2, -1 the
    widest there is; a wider one than the processor has is the widest) changes the speed, never a byte. ValueError for
    anything else.
    """
    if tensor.dtype not in ELEMENTS:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in ELEMENTS)
        raise ValueError(f"tensor: expected one of {expected}, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"tensor: expected a CPU tensor, got one on {tensor.device}")
    if symbols not in SYMBOLS[tensor.dtype]:
        expected = ", ".join(map(repr, SYMBOLS[tensor.dtype]))
        raise ValueError(f"symbols: expected one of {expected} for {tensor.dtype}, got {symbols!r}")
    if not isinstance(chunk_log2, int) or not 14 <= chunk_log2 <= 20:
        raise ValueError(f"chunk_log2: expected 14 to 20, got {chunk_log2!r}")
    shape = torch.tensor(tuple(tensor.shape), dtype=torch.int64)
    return torch.ops.gaugekit.rans_encode(
        _as_bytes(tensor), shape, ELEMENTS[tensor.dtype], KINDS[symbols], chunk_log2, path, front
    )


def open_blob(blob: torch.Tensor) -> tuple[torch.dtype, torch.Size]:
    """(dtype, shape) that a blob [bytes] uint8 holds, after its header, index and sizes were checked;
    CorruptFile.
    """
    element, _, _, _, *shape = checked(torch.ops.gaugekit.rans_open, blob).tolist()
    return DTYPES[element], torch.Size(shape)


def decode(blob: torch.Tensor, start: int, stop: int, out: torch.Tensor, path: int = -1) -> None:
    """Elements [start, stop) of the blob, counted in row-major order, into contiguous ``out``;
    CorruptFile.
    """
    checked(torch.ops.gaugekit.rans_decode, blob, start, stop, _as_bytes(out), path)


def shift_rows(data: torch.Tensor, shifts: torch.Tensor, out: torch.Tensor) -> None:
    """data[n, s, c] + shifts[n, c] into ``out``: integers of 8, 16 or 32 bits that wrap around.

    data and out [N, S, C], shifts [N, C], contiguous. It runs on the coder's threads: torch's own would wait awake for
    more such work while those of the coder want the processors.
    """
    torch.ops.gaugekit.shift_rows(data, shifts, out)


def crc32c(data: torch.Tensor, crc: int = 0) -> int:
    """CRC-32C (RFC 3720) of a contiguous uint8 vector; ``crc`` continues the checksum of what came before
    it.
    """
    return torch.ops.gaugekit.crc32c(data, crc).item()
