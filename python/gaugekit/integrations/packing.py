"""Packs each matrix as transformers reads it, so that loading needs little more memory than the packed model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from ..checkpoint import Checkpoint
from ..nn.packed_matrix import PackedMatrix
from ..nn.packing import matrix_of, packable, place
from ..ops.rans import crc32c
from . import loading


class Packing(ConversionOps):
    """Packs the matrices of plain linear layers and embeddings, one at a time, while a checkpoint is read.

    Until all are there, a stand-in of the matrix' shape and no memory takes its place, so that transformers ties a head
    to its embedding as it always does; ``finish`` then puts the packed layers in, with one matrix where they are tied.
    """

    def __init__(self):
        self.matrices: dict[int, tuple[nn.Parameter, PackedMatrix]] = {}

    def check(self, dtype: torch.dtype, converted: bool) -> None:
        """ValueError unless the model is loaded in a dtype that packs, from a plain directory."""
        if converted:
            raise ValueError(
                "quantization_config: expected a plain directory for packed=True, got a converted one"
            )
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: expected torch.bfloat16 or torch.float16 for packed=True, got {dtype}")

    def takes(self, model: nn.Module, name: str) -> bool:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        return (
            last == "weight" and packable(module) and module.weight.dtype in (torch.bfloat16, torch.float16)
        )

    def convert(self, input_dict: dict, full_layer_name: str, model: nn.Module, **_) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        matrix = matrix_of(module, value.to(module.weight.dtype))
        # Equal stand-ins mean equal matrices: transformers compares them before it ties two that both are in the file.
        check = crc32c(matrix.raw.cpu().flatten(), crc32c(matrix.planes.cpu().flatten().view(torch.uint8)))
        made = torch.tensor(check, dtype=torch.float64, device=value.device).expand(value.shape)
        made = nn.Parameter(made, requires_grad=False)
        self.matrices[id(made)] = (made, matrix)
        return {full_layer_name: made}

    def finish(self, model: nn.Module) -> None:
        """Puts the packed layers in the place of those that hold stand-ins."""
        for path, module in list(model.named_modules()):
            if packable(module) and id(module.weight) in self.matrices:
                place(model, path, self.matrices[id(module.weight)][1])
        self.matrices.clear()


def load_packed(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a directory, plain or written by ``gaugekit pack``, with its matrices packed; in evaluation mode.

    One tensor is read at a time, through no mapping, and packed before the next: memory stays one tensor above the
    packed model, and so does address space. ``dtype`` bfloat16 or float16 (None: what most weights are stored in).
    ValueError for another dtype, a converted directory, or weights that are missing.
    """
    checkpoint = Checkpoint(loading.directory(path))
    if checkpoint.config.get("quantization_config"):
        raise ValueError(f"path: expected a plain or packed directory, got a converted one: {path}")
    if dtype is None:
        held = Counter()
        for name in checkpoint.names():
            held[checkpoint.dtype(name)] += checkpoint.bytes(name)
        dtype = held.most_common(1)[0][0]
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected torch.bfloat16 or torch.float16, got {dtype}")
    model, stored = loading.skeleton(checkpoint.path, dtype), set(checkpoint.names())
    prefix = f"{model.base_model_prefix}."
    tied = getattr(model, "all_tied_weights_keys", None) or {}

    def read(name: str) -> Tensor | None:
        found = (one for one in (name, name.removeprefix(prefix), prefix + name) if one in stored)
        return None if (one := next(found, None)) is None else checkpoint.read(one)

    matrices = {}
    for path_, module in list(model.named_modules()):
        for last, parameter in list(module.named_parameters(recurse=False)):
            name = f"{path_}.{last}" if path_ else last
            if last == "weight" and packable(module):
                matrices[name] = path_
            elif (value := read(name)) is not None:
                value = nn.Parameter(value.to(parameter.dtype), requires_grad=False)
                module.register_parameter(last, value)
            else:
                raise ValueError(f"{path}: expected the weights {name!r}, found none")
    made = {
        name: matrix_of(model.get_submodule(at), value.to(dtype))
        for name, at in matrices.items()
        if (value := read(name)) is not None
    }
    for name, at in matrices.items():
        matrix = made.get(name) or made.get(tied.get(name, ""))
        if matrix is None:
            raise ValueError(f"{path}: expected the weights {name!r}, found none")
        place(model, at, matrix)
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(checkpoint.read(name))
    return model
