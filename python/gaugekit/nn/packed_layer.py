"""What a packed linear layer and a packed embedding share: a weight that is a PackedMatrix."""

from __future__ import annotations

import torch
from torch import nn

from gaugekit.nn.packed_matrix import PARTS, PackedMatrix
from gaugekit.ops.packed_linear.weight import PackedWeight


class PackedLayer(nn.Module):
    """A layer whose ``weight`` is a packed, frozen parameter with the plain layer's name, shape and dtype.

    Casts of the layer leave the weight as it is. A plain parameter put in its place (by assignment, by a wrapper that
    shards parameters) is used as it is. ``state_dict`` is the plain layer's; ``load_state_dict`` takes it, and packs,
    or the five packed parts under ``packed.``.
    """

    def __init__(
        self,
        matrix: PackedMatrix | None,
        rows: int,
        columns: int,
        weights: str,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Embedding's, which would make a table
        if weights not in ("bfloat16", "float16"):
            raise ValueError(f"weights: expected bfloat16 or float16, got {weights!r}")
        if matrix is None:
            matrix = PackedMatrix.empty(rows, columns, getattr(torch, weights), device)
        if matrix.value.shape != (rows, columns):
            raise ValueError(f"matrix: expected [{rows}, {columns}], got {list(matrix.value.shape)}")
        self.weight = matrix.parameter()

    @property
    def packed(self) -> PackedMatrix | None:
        """The packed weight, the same object in layers that share it; None where a plain one was put in its place."""
        weight = self._parameters["weight"]
        return weight if isinstance(weight, PackedMatrix) else None

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weight."""
        return self.packed.value.bytes

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        weight = self._parameters.get(name)
        awaited = isinstance(weight, PackedMatrix) and weight.is_meta and type(param) is nn.Parameter
        if awaited and not param.is_meta and (param.dtype, param.shape) == (weight.dtype, weight.shape):
            param = PackedMatrix.of(
                param, weight.transposed
            ).parameter()  # the place waited for weights to pack
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        weight = self.packed
        if weight is None:
            return super()._apply(fn, recurse)
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        self._parameters["weight"] = weight.moved(fn)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        rest = (state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        weight = self.packed
        if weight is None:
            super()._load_from_state_dict(*rest)
            return
        self._parameters["weight"] = None  # it is no place to copy into, and is seen to below
        try:
            super()._load_from_state_dict(*rest)
        finally:
            self._parameters["weight"] = weight
        parts = {f"{prefix}packed.{name}": name for name in PARTS}
        unexpected[:] = [name for name in unexpected if name != f"{prefix}weight" and name not in parts]
        plain, held = state_dict.get(f"{prefix}weight"), {name for name in parts if name in state_dict}
        if plain is not None and plain.shape == weight.shape:
            if weight.is_meta and local_metadata.get("assign_to_params_buffers"):
                self._parameters["weight"] = weight.received(plain.clone())
            else:
                weight.write(plain)
        elif plain is not None:
            errors.append(f"{prefix}weight: expected {list(weight.shape)}, got {list(plain.shape)}")
        elif held == parts.keys():
            tensors = {part: state_dict[name].to(weight.device, copy=True) for name, part in parts.items()}
            weight.hold(PackedWeight(**tensors, columns=weight.value.columns))
        else:
            missing += sorted(parts.keys() - held) if held else [f"{prefix}weight"]

    def extra_repr(self) -> str:
        return f"weight={self.weight!r}" if self.packed is not None else f"weight={list(self.weight.shape)}"
