"""Makes a model's plain layers packed ones and plain again, each layer the same object throughout."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gaugekit.nn.packed_embedding import PackedEmbedding
from gaugekit.nn.packed_layer import PackedLayer
from gaugekit.nn.packed_linear import PackedLinear
from gaugekit.nn.packed_matrix import PackedMatrix

DTYPES = (torch.bfloat16, torch.float16)


@dataclass
class Packed:
    """What ``pack`` did: {path: form} of the layers it packed, {path: why} of every other that holds a matrix, the
    bytes of all parameters and buffers before and after, and how many numbers in vectors (norms, biases) stay plain."""

    packed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    vectors: int = 0


def transposed(module: nn.Module) -> bool:
    """Whether ``module`` is GPT-2's ``Conv1D``: a linear layer whose weight is [inputs, outputs]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def form_of(module: nn.Module) -> type[PackedLayer] | None:
    """The packed layer that computes what the plain ``module`` does; None for a subclass, which may compute
    something else, and any other module."""
    if type(module) is nn.Embedding:
        return PackedEmbedding
    return PackedLinear if type(module) is nn.Linear or transposed(module) else None


def why_not(module: nn.Module) -> str | None:
    """Why the layer ``module`` has to stay plain, apart from its weight's numbers; None where it may be packed."""
    kind = type(module)
    if form_of(module) is None:
        return f"it is a {kind.__name__}, not a plain linear layer or embedding"
    if "_hf_hook" in module.__dict__:
        return "it has a hook of accelerate's, which moves plain weights"
    if {"forward", "_call_impl"} & module.__dict__.keys():
        return "its forward was replaced"
    if getattr(kind.forward, "__globals__", None) is not vars(sys.modules[kind.__module__]):
        return f"the forward of {kind.__name__} was replaced"
    if getattr(module, "max_norm", None) is not None:
        return "it has max_norm, which changes its weights"
    taken = {"packed", "packed_bytes", "stands_for", "form"}
    held = (module.__dict__, module._parameters, module._buffers, module._modules)
    if clash := sorted(name for name in taken if any(name in names for names in held)):
        return f"it has something of its own called {clash[0]!r}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (a parametrisation, a pruning, a wrapper that shards)"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight).__name__}"
    if weight.is_meta or weight.dtype not in DTYPES:
        return "its weights are " + ("on the meta device" if weight.is_meta else f"{weight.dtype}")
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "its weight has hooks for gradients, which a frozen weight has not"
    if weight.grad is not None:
        return "its weight holds a gradient, which would be lost"
    return None


def pack(model: nn.Module) -> Packed:
    """Packs every layer of ``model`` that may be, each in its place, its hooks and attributes untouched.

    A weight that several layers hold becomes one packed matrix for all of them, or stays plain where one of them has
    to; so does a matrix that packing would make larger.
    """
    done = Packed(bytes_before=held_bytes(model))
    paths: dict[nn.Module, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, path)
    reasons, holders = _reasons(model, paths)
    for module in paths:
        if module not in reasons or reasons[module] is not None or isinstance(module, PackedLayer):
            continue
        weight = module.weight
        matrix = matrix_of(module, weight)
        for holder in holders[id(weight)]:
            if matrix is None:
                reasons[holder] = "packed, its weights would take no less memory"
            else:
                place(holder, matrix)
    for path, module in model.named_modules(remove_duplicate=False):
        if reasons.get(module) is not None:
            done.left[path] = reasons[module]
        elif module in reasons:
            done.packed[path] = module.form
    done.bytes_after = held_bytes(model)
    done.vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    return done


def _reasons(model: nn.Module, paths: dict[nn.Module, str]) -> tuple[dict[nn.Module, str | None], dict]:
    """Why each module that holds a plain matrix has to stay plain, None for those that need not; and the modules
    that hold each parameter, by its id."""
    wrapped = any(isinstance(module, DistributedDataParallel) for module in paths)
    memory, adapters = _memory(model), _adapters(paths)
    reasons: dict[nn.Module, str | None] = {}
    holders: dict[int, list[nn.Module]] = {}
    for module in paths:
        own = [p for p in module._parameters.values() if p is not None]
        for parameter in own:
            holders.setdefault(id(parameter), []).append(module)
        is_layer = isinstance(module, (nn.Linear, nn.Embedding)) or transposed(module)
        if not is_layer and all(p.dim() < 2 or isinstance(p, PackedMatrix) for p in own):
            continue
        reasons[module] = why_not(module)
        if wrapped:
            reasons[module] = "DistributedDataParallel holds its weights already: pack before wrapping"
        elif module in adapters:
            reasons[module] = "it is an adapter, there to be trained"
        elif reasons[module] is None and memory[module.weight.untyped_storage()._cdata] > 1:
            reasons[module] = "its weights share memory with another tensor of the model"
    for module, reason in list(reasons.items()):
        others = holders[id(module.weight)] if reason is None else []
        for other in others:
            if transposed(other) != transposed(module):
                reasons[module] = f"its weight is tied to {paths[other]!r}, which uses it transposed"
            elif other is not module and reasons[other] is not None:
                reasons[module] = f"its weight is tied to {paths[other]!r}: {reasons[other]}"
                break
    return reasons, holders


def _adapters(paths: dict[nn.Module, str]) -> set[nn.Module]:
    """The layers that PEFT put beside others (it lists where under ``adapter_layer_names``)."""
    kept = set()
    for module in paths:
        for name in getattr(module, "adapter_layer_names", ()):
            if isinstance(child := getattr(module, name, None), nn.Module):
                kept |= set(child.modules())
    return kept


def _memory(model: nn.Module) -> Counter:
    """How many different tensors of ``model`` stand on each storage."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()] if not isinstance(t, PackedMatrix)}
    return Counter(tensor.untyped_storage()._cdata for tensor in tensors.values() if not tensor.is_meta)


def matrix_of(module: nn.Module, weight: Tensor) -> PackedMatrix | None:
    """``weight`` packed as the plain layer ``module`` stores it; None where that would not save memory."""
    if not weight.numel():
        return None
    matrix = PackedMatrix.of(weight, transposed(module))
    return matrix if matrix.value.bytes < weight.nbytes else None


def place(module: nn.Module, matrix: PackedMatrix) -> None:
    """Makes the plain layer ``module`` the packed one around ``matrix``; the object and what hangs on it stay."""
    form = form_of(module)
    module._parameters["weight"] = matrix.parameter()
    module.__dict__["stands_for"] = type(module)
    module.__class__ = form


def settle(model: nn.Module) -> None:
    """Makes packed layers of the plain ones whose weights are packed matrices by now; a matrix that something else
    holds too is unpacked for all."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, PackedMatrix):
                holders.setdefault(id(weight), []).append((module, name))
    for places in holders.values():
        weight = places[0][0]._parameters[places[0][1]]
        if all(name == "weight" and form_of(module) and transposed(module) == weight.transposed
               for module, name in places):  # fmt: skip
            for module, _ in places:
                place(module, weight)
        else:
            plain = weight.plain_parameter()
            for module, name in places:
                module._parameters[name] = plain


def unpack(model: nn.Module) -> list[str]:
    """Makes every packed layer of ``model`` plain, bit for bit; what shared a matrix is tied. Returns the paths."""
    plain: dict[int, nn.Parameter] = {}
    paths = [
        p for p, module in model.named_modules(remove_duplicate=False) if isinstance(module, PackedLayer)
    ]
    for module in list(model.modules()):
        for name, weight in list(module._parameters.items()):
            if isinstance(weight, PackedMatrix):
                module._parameters[name] = plain.setdefault(id(weight), weight.plain_parameter())
        if isinstance(module, PackedLayer):
            default = nn.Embedding if isinstance(module, PackedEmbedding) else nn.Linear
            module.__class__ = module.__dict__.pop("stands_for", default)
    return paths


def held_bytes(model: nn.Module) -> int:
    """Memory of the parameters and buffers of ``model``, each once, packed ones as they are held."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(t.value.bytes if isinstance(t, PackedMatrix) else t.nbytes for t in tensors.values())
