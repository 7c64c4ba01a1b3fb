"""Packs each matrix as transformers reads it, so that loading needs little more memory than the packed model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.checkpoint import resident
from gaugekit.hf.upstream import unfit

try:
    from transformers.core_model_loading import ConversionOps
except ImportError as error:
    raise unfit(__name__, error) from error


class Packing(ConversionOps):
    """Packs the weights of plain linear layers, embeddings and experts, one at a time, while a checkpoint is read.

    A packed matrix is a parameter like another to transformers, which ties a head to its embedding as it always does;
    ``finish`` then makes the layers packed ones.
    """

    def check(self, dtype: torch.dtype, converted: bool) -> None:
        """ValueError unless the model is loaded in a dtype that packs, from a plain directory."""
        if converted:
            raise ValueError(
                "quantization_config: expected a plain directory for packed=True, got a converted one"
            )
        if dtype not in resident.DTYPES:
            raise ValueError(f"dtype: expected torch.bfloat16 or torch.float16 for packed=True, got {dtype}")

    def takes(self, model: nn.Module, name: str) -> bool:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if (
            resident.form_of(module) is None
            or last not in resident.matrices(module)
            or getattr(module, "max_norm", None) is not None
            or resident.other_experts(module) is not None
        ):
            return False
        weight = module._parameters[last]
        return weight is not None and weight.dtype in resident.DTYPES

    def convert(self, input_dict: dict, model: nn.Module, **_: Any) -> dict[str, Tensor]:
        converted = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            # what the model keeps in float32 arrives so, whatever dtype was asked for
            if value.dtype in resident.DTYPES and self.takes(model, name):
                path, _, last = name.rpartition(".")
                module = model.get_submodule(path)
                if value.dim() == module._parameters[last].dim():
                    matrix = resident.matrix_of(module, value)
                    value = value if matrix is None else matrix.parameter()
            converted[name] = value
        return converted

    def finish(self, model: nn.Module) -> None:
        """Makes packed layers of those whose weights were packed."""
        resident.settle(model)
