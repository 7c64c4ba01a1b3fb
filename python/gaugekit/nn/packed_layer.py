"""What packed layers share: parameters that are packed matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from gaugekit.nn.packed_matrix import PARTS, PackedMatrix
from gaugekit.ops.packed_linear.weight import DTYPES, PackedWeight


class PackedLayer(nn.Module):
    """A layer with packed, frozen parameters of the plain layer's names, shapes and dtypes.

    Casts of the layer leave them as they are. A plain parameter put in the place of one (by assignment, by a wrapper
    that shards parameters) is used as it is. ``state_dict`` is the plain layer's; ``load_state_dict`` takes it, and
    packs.
    """

    def packed_weights(self) -> dict[str, PackedMatrix]:
        """The parameters that are packed, by name."""
        return {n: weight for n, weight in self._parameters.items() if isinstance(weight, PackedMatrix)}

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed parameters."""
        return sum(weight.value.bytes for weight in self.packed_weights().values())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        weight = self._parameters.get(name)
        awaited = isinstance(weight, PackedMatrix) and weight.is_meta and type(param) is nn.Parameter
        if awaited and not param.is_meta and (param.dtype, param.shape) == (weight.dtype, weight.shape):
            param = PackedMatrix.of(
                param, weight.transposed
            ).parameter()  # the place waited for weights to pack
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        weights = self.packed_weights()
        self._parameters.update(dict.fromkeys(weights))
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters.update(weights)
        self._parameters.update({name: weight.moved(fn) for name, weight in weights.items()})
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weights = self.packed_weights()
        self._parameters.update(dict.fromkeys(weights))  # no places to copy into, and seen to below
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
        finally:
            self._parameters.update(weights)
        for name, weight in weights.items():
            unexpected[:] = [key for key in unexpected if key != prefix + name]
            plain = state_dict.get(prefix + name)
            if plain is None:
                self._load_absent(weight, name, state_dict, prefix, missing)
            elif plain.shape != weight.shape:
                errors.append(f"{prefix}{name}: expected {list(weight.shape)}, got {list(plain.shape)}")
            elif weight.is_meta and local_metadata.get("assign_to_params_buffers"):
                self._parameters[name] = weight.received(plain.clone())
            else:
                weight.write(plain)

    def _load_absent(self, weight: PackedMatrix, name: str, state_dict, prefix, missing):
        missing.append(prefix + name)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={weight!r}" if isinstance(weight, PackedMatrix) else f"{name}={list(weight.shape)}"
            for name, weight in self._parameters.items()
            if weight is not None and weight.dim() > 1
        )


def _refuse_parameter_adapter(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """RuntimeError where PEFT's wrapper of an adapted parameter is put around a packed layer. In every forward it
    would replace the parameter, which fails inside torch by an error that names neither."""
    if type(module).__name__ == "ParamWrapper" and isinstance(child, PackedLayer):
        kind = child.__dict__.get("stands_for", type(child)).__name__
        raise RuntimeError(
            f"an adapter on a parameter (PEFT's target_parameters) needs plain weights, and those of this {kind} are "
            "packed: gaugekit.unfuse(model) first, or add the adapter before packing, which leaves this layer plain"
        )


register_module_module_registration_hook(_refuse_parameter_adapter)


class PackedMatrixLayer(PackedLayer):
    """A packed layer of one matrix, ``weight``; ``load_state_dict`` also takes its five packed parts under ``packed.``,
    which earlier versions saved."""

    def __init__(
        self,
        matrix: PackedMatrix | None,
        rows: int,
        columns: int,
        weights: str,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Embedding's, which would make a table
        if weights not in {str(dtype).removeprefix("torch.") for dtype in DTYPES}:
            raise ValueError(f"weights: expected bfloat16, float16 or float8_e5m2, got {weights!r}")
        if matrix is None:
            matrix = PackedMatrix.empty(rows, columns, getattr(torch, weights), device)
        if matrix.value.shape != (rows, columns):
            raise ValueError(f"matrix: expected [{rows}, {columns}], got {list(matrix.value.shape)}")
        self.weight = matrix.parameter()

    @property
    def packed(self) -> PackedMatrix | None:
        """The packed weight, the same object in layers that share it; None where a plain one was put in its place."""
        return self.packed_weights().get("weight")

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if self.packed is not None:
            parts = {f"{prefix}packed.{part}" for part in PARTS}
            unexpected[:] = [key for key in unexpected if key not in parts]

    def _load_absent(self, weight: PackedMatrix, name: str, state_dict, prefix, missing):
        parts = {f"{prefix}packed.{part}": part for part in PARTS}
        held = {key for key in parts if key in state_dict}
        if held != parts.keys():
            missing += sorted(parts.keys() - held) if held else [f"{prefix}{name}"]
            return
        tensors: dict[str, Tensor] = {
            part: state_dict[key].to(weight.device, copy=True) for key, part in parts.items()
        }
        weight.hold(PackedWeight(**tensors, columns=weight.value.columns))
