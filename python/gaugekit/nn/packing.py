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


def packable(module: nn.Module) -> bool:
    """Whether ``module`` is a plain linear layer or embedding: a subclass may compute something else."""
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def place(model: nn.Module, path: str, matrix: PackedMatrix) -> str:
    """Puts a packed layer around ``matrix`` where the packable layer ``path`` of ``model`` was; returns its form."""
    module = model.get_submodule(path)
    rows, columns = matrix.value.shape
    if isinstance(module, nn.Embedding):
        kind = str(matrix.value.dtype).split(".")[1]
        made = PackedEmbedding(rows, columns, module.padding_idx, kind, matrix)
    else:
        made = PackedLinear.from_parts(matrix, module.bias)
    model.set_submodule(path, made.train(module.training))
    return made.form


def pack(model: nn.Module) -> Packed:
    """Packs every plain linear layer and embedding of bf16 or fp16 below ``model``; tied weights become one matrix."""
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
            if id(weight) not in matrices:
                matrices[id(weight)] = PackedMatrix.of(weight)
                done.bytes_before += weight.nbytes
                done.bytes_after += matrices[id(weight)].value.bytes
            done.packed[path] = place(model, path, matrices[id(weight)])
    return done


def unpack(model: nn.Module, paths: list[str]) -> None:
    """Puts plain layers, bit for bit, in the place of the packed ones at ``paths``; what shared a matrix is tied."""
    weights = {}
    for path in paths:
        module = model.get_submodule(path)
        made = module.to_embedding() if isinstance(module, PackedEmbedding) else module.to_linear()
        made.weight = weights.setdefault(id(module.packed), made.weight)
        model.set_submodule(path, made.train(module.training))


def count(model: nn.Module) -> int:
    """How many weights ``model`` holds packed."""
    return sum(module.value.shape.numel() for module in model.modules() if isinstance(module, PackedMatrix))
