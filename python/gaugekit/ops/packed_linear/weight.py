"""A packed matrix (docs/resident.md): its five tensors, packing, unpacking, and the check of what a file holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops.operands import check_tensors
from gaugekit.ops.packed_linear import layout

DTYPES = (torch.bfloat16, torch.float16, torch.float8_e5m2)
# Dtypes that are not packed, and why.
REFUSED = {
    torch.float8_e4m3fn: "packed, float8_e4m3fn weights would take 7.2 to 7.3 of their 8 bits (measured: N(0, 0.02²), "
    "all-MiniLM-L6-v2 and SmolLM2, scaled to its range), too little for what decoding costs"
}
WEIGHT = "Tensor raw, Tensor planes, Tensor escapes, Tensor offsets, Tensor window"


class PackedWeight(NamedTuple):
    """A packed matrix [N, K]: its five tensors (docs/resident.md) and ``columns`` = K."""

    raw: Tensor
    planes: Tensor
    escapes: Tensor
    offsets: Tensor
    window: Tensor
    columns: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.raw.shape[0], self.columns))

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, float16 or float8_e5m2: what the weights are."""
        return layout.layout(self.raw, self.planes)[0]

    @property
    def operands(self) -> tuple[torch.dtype, ...]:
        """The dtypes of x that W is multiplied with: those that hold each of its numbers exactly."""
        own = (torch.float16, torch.bfloat16) if self.dtype == torch.float8_e5m2 else (self.dtype,)
        return *own, torch.float32, torch.float64

    @property
    def bytes(self) -> int:
        """Memory of the five tensors."""
        return sum(part.numel() * part.element_size() for part in self[:5])


def pack_weight(weight: Tensor, *, code_bits: int | None = None) -> PackedWeight:
    """Packs a bfloat16, float16 or float8_e5m2 matrix [N, K], any strides and bit patterns; nothing is lost.

    ``code_bits`` 3 or 4 sets the width of the exponent's code, None takes the smaller result. ValueError for another
    dtype or rank, float8_e5m2 without columns, or 2³¹ escaped exponents and more.
    """
    check_tensors(weight=weight)
    if weight.dtype not in DTYPES:
        why = f": {REFUSED[weight.dtype]}" if weight.dtype in REFUSED else ""
        raise ValueError(f"weight: expected bfloat16, float16 or float8_e5m2, got {weight.dtype}{why}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [N, K], got {list(weight.shape)}")
    if weight.dtype == torch.float8_e5m2 and not weight.shape[1]:
        raise ValueError(f"weight: expected columns in a float8_e5m2 matrix, got {list(weight.shape)}")
    if code_bits not in (None, 3, 4):
        raise ValueError(f"code_bits: expected 3, 4 or None, got {code_bits!r}")
    e5m2 = weight.dtype == torch.float8_e5m2
    weight = layout.words_of_e5m2(weight.detach()) if e5m2 else weight.detach().contiguous()
    survey = torch.ops.gaugekit.packed_survey(weight)
    totals = survey[:, :, 1].sum(0).tolist()
    if code_bits is None:
        planes = weight.shape[0] * layout.blocks_of(weight.shape[1]) * layout.BLOCK
        code_bits = 3 if 3 * planes + 8 * totals[0] <= 4 * planes + 8 * totals[1] else 4
    if totals[code_bits - 3] >= 2**31:
        raise ValueError(f"weight: expected fewer than 2^31 escaped exponents, got {totals[code_bits - 3]}")
    window = survey[:, code_bits - 3, 0].to(torch.uint8)
    begins = torch.nn.functional.pad(survey[:, code_bits - 3, 1].cumsum(0), (1, 0))
    raw, *parts = torch.ops.gaugekit.packed_encode(weight, window, begins, code_bits, totals[code_bits - 3])
    raw = raw.new_empty((weight.shape[0], 0)) if e5m2 else raw
    return PackedWeight(raw, *parts, window, weight.shape[1])


def unpack_weight(packed: PackedWeight) -> Tensor:
    """The matrix [N, K] that was packed, bit for bit. ValueError where the parts do not fit together."""
    check(packed)
    return torch.ops.gaugekit.packed_rows(None, *packed)


def packed_rows(index: Tensor, packed: PackedWeight) -> Tensor:
    """Rows ``index`` int64 [R] of the packed matrix as a new tensor [R, K]. ValueError unless index is that."""
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"index: expected int64 [R], got {index.dtype} {list(index.shape)}")
    return torch.ops.gaugekit.packed_rows(index, *packed)


def empty_weight(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> PackedWeight:
    """The parts of a packed matrix of this shape with no escapes: places to load into (device "meta"), or one value."""
    blocks, planes = layout.blocks_of(columns), 3 + len(layout.fields(dtype)[2])
    raw = 0 if dtype == torch.float8_e5m2 else blocks * layout.BLOCK
    sizes = [(torch.uint8, (rows, raw)), (torch.int64, (rows, planes, blocks)), (torch.uint8, (0,)),
             (torch.int32, (rows * layout.segments_of(columns) + 1,)), (torch.uint8, (rows,))]  # fmt: skip
    return PackedWeight(*(torch.zeros(size, dtype=kind, device=device) for kind, size in sizes), columns)


def check(packed: PackedWeight) -> None:
    """ValueError unless the parts of a packed weight have the shapes and dtypes that belong together, and its offsets
    are those of its planes: what a file may have got wrong."""
    n, blocks = packed.raw.shape[0], layout.blocks_of(packed.columns)
    segments = layout.segments_of(packed.columns)
    planes = packed.planes.shape[1] if packed.planes.dim() == 3 else 3
    raw = 0 if planes > 4 and packed.raw.shape[1:] == (0,) else blocks * layout.BLOCK  # float8_e5m2 has none
    expected = {"raw": (torch.uint8, (n, raw)), "window": (torch.uint8, (n,)),
                "planes": (torch.int64, (n, planes, blocks)),
                "escapes": (torch.uint8, (packed.escapes.numel(),)),
                "offsets": (torch.int32, (n * segments + 1,))}  # fmt: skip
    for name, (dtype, shape) in expected.items():
        part = getattr(packed, name)
        if part.dtype != dtype or part.shape != shape:
            raise ValueError(
                f"packed.{name}: expected {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}"
            )
    if packed.planes.shape[1] not in (3, 4, 6, 7):
        raise ValueError(f"packed.planes: expected 3, 4, 6 or 7 planes, got {packed.planes.shape[1]}")
    if (
        not torch.equal(layout.offsets_of(packed.planes), packed.offsets.long())
        or packed.offsets[-1] != packed.escapes.numel()
    ):
        raise ValueError(
            "packed.offsets: expected the running number of escaped codes in packed.planes, got others"
        )


def check_operand(x: Tensor, packed: PackedWeight) -> None:
    """ValueError unless x is of a dtype that W is multiplied with."""
    if x.dtype not in packed.operands:
        own = ", ".join(str(dtype) for dtype in packed.operands[:-2])
        raise ValueError(f"x: expected {own}, float32 or float64, got {x.dtype}")


def _fake_rows(index, raw, planes, escapes, offsets, window, columns):
    count = raw.shape[0] if index is None else index.shape[0]
    return raw.new_empty((count, columns), dtype=layout.layout(raw, planes)[0])


def _fake_encode(weight, window, begins, code_bits, escape_count):
    n, columns = weight.shape
    blocks, planes = layout.blocks_of(columns), code_bits + len(layout.fields(weight.dtype)[2])
    sizes = [((n, blocks * layout.BLOCK), torch.uint8), ((n, planes, blocks), torch.int64),
             ((escape_count,), torch.uint8), ((n * layout.segments_of(columns) + 1,), torch.int32)]  # fmt: skip
    return tuple(weight.new_empty(size, dtype=dtype) for size, dtype in sizes)


_library.define(
    "packed_survey(Tensor weight) -> Tensor",
    layout.survey,
    lambda weight: weight.new_empty((weight.shape[0], 2, 2), dtype=torch.int32),
)
_library.define(
    "packed_encode(Tensor weight, Tensor window, Tensor begins, int code_bits, int escape_count)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    layout.encode,
    _fake_encode,
)
_library.define(f"packed_rows(Tensor? index, {WEIGHT}, int columns) -> Tensor", layout.rows, _fake_rows)
