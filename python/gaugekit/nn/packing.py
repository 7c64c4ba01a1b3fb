"""Puts packed layers in the place of a model's plain ones, and plain ones back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from gaugekit.nn.packed_embedding import PackedEmbedding
from gaugekit.nn.packed_linear import PackedLinear
from gaugekit.nn.packed_matrix import PackedMatrix


@dataclass
class Packed:
    """What ``pack`` did: {path: form}, {path: why it was left}, and the bytes of the matrices it packed."""

    packed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0


def transposed(module: nn.Module) -> bool:
    """Whether ``module`` is GPT-2's ``Conv1D``: a linear layer whose weight is [inputs, outputs]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def packable(module: nn.Module) -> bool:
    """Whether ``module`` is a plain linear layer or embedding: a subclass may compute something else."""
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return type(module) is nn.Linear or transposed(module)


def matrix_of(module: nn.Module, weight: torch.Tensor) -> PackedMatrix:
    """Packs ``weight``, which is stored as the packable ``module`` stores its own."""
    return PackedMatrix.of(weight.T if transposed(module) else weight)


def place(model: nn.Module, path: str, matrix: PackedMatrix) -> str:
    """Puts a packed layer around ``matrix`` where the packable layer ``path`` of ``model`` was; returns its form."""
    module = model.get_submodule(path)
    rows, columns = matrix.value.shape
    if isinstance(module, nn.Embedding):
        kind = str(matrix.value.dtype).split(".")[1]
        made = PackedEmbedding(rows, columns, module.padding_idx, kind, matrix)
    else:
        made = PackedLinear.from_parts(matrix, module.bias)
        made.__dict__["stands_for"] = type(module)
    model.set_submodule(path, made.train(module.training))
    return made.form


def pack(model: nn.Module) -> Packed:
    """Packs every packable layer of bf16 or fp16 below ``model``; tied weights become one matrix."""
    done, matrices = Packed(), {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not path or not packable(module):
            continue
        weight = module.weight
        if weight.dtype not in (torch.bfloat16, torch.float16) or weight.is_meta:
            done.left[path] = "its weights are " + (
                "on the meta device" if weight.is_meta else f"{weight.dtype}"
            )
        elif module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            done.left[path] = "it has hooks, which its replacement would not run"
        else:
            key = (id(weight), transposed(module))
            if key not in matrices:
                matrices[key] = matrix_of(module, weight)
                done.bytes_before += weight.nbytes
                done.bytes_after += matrices[key].value.bytes
            done.packed[path] = place(model, path, matrices[key])
    return done


def unpack(model: nn.Module, paths: list[str]) -> None:
    """Puts plain layers, bit for bit, in the place of the packed ones at ``paths``; what shared a matrix is tied."""
    weights = {}
    for path in paths:
        module = model.get_submodule(path)
        made = module.to_embedding() if isinstance(module, PackedEmbedding) else module.to_linear()
        kind = module.__dict__.get("stands_for", type(made))
        if kind in (nn.Linear, nn.Embedding):
            made.weight = weights.setdefault(id(module.packed), made.weight)
        else:  # Conv1D(outputs, inputs)
            linear = made
            with torch.device("meta"):
                made = kind(linear.out_features, linear.in_features)
            made.weight, made.bias = nn.Parameter(linear.weight.T.contiguous()), linear.bias
        model.set_submodule(path, made.train(module.training))


def count(model: nn.Module) -> int:
    """How many weights ``model`` holds packed."""
    return sum(module.value.shape.numel() for module in model.modules() if isinstance(module, PackedMatrix))
