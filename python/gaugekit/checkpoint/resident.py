"""Makes a model's plain layers packed ones and plain again, each layer the same object throughout."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gaugekit.nn.packed_embedding import PackedEmbedding
from gaugekit.nn.packed_experts import IMPLEMENTATIONS, PackedExperts, packed_class, projections
from gaugekit.nn.packed_layer import PackedLayer
from gaugekit.nn.packed_linear import PackedLinear
from gaugekit.nn.packed_matrix import PackedMatrix
from gaugekit.ops.packed_linear.weight import REFUSED

DTYPES = (torch.bfloat16, torch.float16)  # a model's
E5M2 = torch.float8_e5m2  # of the weights of linear layers alone


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
    """Whether the weights of ``module`` are [inputs, outputs]: GPT-2's ``Conv1D``, gpt-oss's experts."""
    kind = type(module)
    if projections(module):
        return bool(module.is_transposed)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def form_of(module: nn.Module) -> type[PackedLayer] | None:
    """The packed layer that computes what the plain ``module`` does; None for a subclass, which may compute
    something else, and any other module."""
    if type(module) is nn.Embedding:
        return PackedEmbedding
    if projections(module):
        return packed_class(type(module))
    return PackedLinear if type(module) is nn.Linear or transposed(module) else None


def matrices(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights of the plain ``module`` that its packed form packs."""
    return projections(module) or ("weight",)


def why_not(module: nn.Module) -> str | None:
    """Why the layer ``module`` has to stay plain, apart from its weight's numbers; None where it may be packed."""
    kind = type(module)
    if form_of(module) is None:
        return f"it is a {kind.__name__}, not a plain linear layer or embedding, nor experts of transformers' interface"
    if reason := other_experts(module):
        return reason
    if "_hf_hook" in module.__dict__:
        return "it has a hook of accelerate's, which moves plain weights"
    if {"forward", "_call_impl", "_apply_gate"} & module.__dict__.keys():
        return "its forward was replaced"
    forward = getattr(kind.forward, "__wrapped__", kind.forward)
    if getattr(forward, "__globals__", None) is not vars(sys.modules[kind.__module__]):
        return f"the forward of {kind.__name__} was replaced"
    if getattr(module, "max_norm", None) is not None:
        return "it has max_norm, which changes its weights"
    taken = {"packed", "packed_bytes", "packed_weights", "stands_for", "form"}
    held = (module.__dict__, module._parameters, module._buffers, module._modules)
    if clash := sorted(name for name in taken if any(name in names for names in held)):
        return f"it has something of its own called {clash[0]!r}"
    reasons = (_plain_weight(name, module._parameters.get(name)) for name in matrices(module))
    return next((reason for reason in reasons if reason is not None), None) or _why_not_e5m2(module)


def _why_not_e5m2(module: nn.Module) -> str | None:
    """Why a layer of float8_e5m2 weights has to stay plain; None for one that need not, and one of other weights.

    torch does not run such a linear layer by itself: whoever keeps one casts its weight before each product, which the
    packed layer does, and may scale it, which the packed layer does not."""
    if all(module._parameters[name].dtype != E5M2 for name in matrices(module)):
        return None
    if form_of(module) is not PackedLinear:
        return f"its weights are {E5M2}, which are packed in linear layers only"
    loose = {name for name, value in module.__dict__.items() if isinstance(value, Tensor)}
    others = (module._parameters.keys() | module._buffers.keys() | loose) - {"weight", "bias"}
    if others:
        return f"it has {min(others)!r} beside its {E5M2} weight, maybe a scale, which a packed layer would not apply"
    return None


def other_experts(module: nn.Module) -> str | None:
    """Why an experts module has to stay plain, apart from what any layer may have; None for another module."""
    if not projections(module):
        return None
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in IMPLEMENTATIONS:
        return f"its experts are computed by {implementation!r}, which is none of transformers' own"
    wrong = [n for n in projections(module) if (w := module._parameters.get(n)) is not None and w.dim() != 3]
    if wrong:
        return f"its {wrong[0]} is no [experts, outputs, inputs]"
    return None


def _plain_weight(name: str, weight: nn.Parameter | None) -> str | None:
    """Why a parameter ``name`` of a layer cannot be packed, apart from its numbers."""
    if weight is None:
        return f"its {name} is no parameter of its own (a parametrisation, a pruning, a wrapper that shards)"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its {name} is a {type(weight).__name__}"
    if weight.is_meta:
        return "its weights are on the meta device"
    if weight.dtype not in (*DTYPES, E5M2):
        return f"its weights are {weight.dtype}" + (f": {why}" if (why := REFUSED.get(weight.dtype)) else "")
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return f"its {name} has hooks for gradients, which a frozen weight has not"
    if weight.grad is not None:
        return f"its {name} holds a gradient, which would be lost"
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
        weights = [module._parameters[name] for name in matrices(module)]
        packed = [matrix_of(module, weight) for weight in weights]
        for holder in holders[id(weights[0])]:  # of experts there is one holder
            if any(matrix is None for matrix in packed):
                reasons[holder] = "packed, its weights would take no less memory"
            else:
                place(holder, packed)
    for path, module in model.named_modules(remove_duplicate=False):
        if reasons.get(module) is not None:
            done.left[path] = reasons[module]
        elif module in reasons:
            done.packed[path] = module.form
    done.bytes_after = held_bytes(model)
    biases = {id(p) for m in paths if isinstance(m, PackedExperts) for p in m._parameters.values()}
    plain = [p for p in model.parameters() if not isinstance(p, PackedMatrix)]
    done.vectors = sum(p.numel() for p in plain if p.dim() < 2 or id(p) in biases)
    return done


def _reasons(model: nn.Module, paths: dict[nn.Module, str]) -> tuple[dict[nn.Module, str | None], dict]:
    """Why each module that holds a plain matrix has to stay plain, None for those that need not; and the modules
    that hold each parameter, by its id."""
    wrapped = any(isinstance(module, DistributedDataParallel) for module in paths)
    memory, adapters, adapted = _memory(model), _adapters(paths), _adapted(paths)
    reasons: dict[nn.Module, str | None] = {}
    holders: dict[int, list[nn.Module]] = {}
    for module in paths:
        own = [p for p in module._parameters.values() if p is not None]
        for parameter in own:
            holders.setdefault(id(parameter), []).append(module)
        is_layer = isinstance(module, (nn.Linear, nn.Embedding)) or transposed(module)
        if not is_layer and all(p.dim() < 2 or isinstance(p, PackedMatrix) for p in own):
            continue
        if isinstance(module, PackedExperts) and any(isinstance(p, PackedMatrix) for p in own):
            continue  # what is plain are biases, a vector for each expert
        reasons[module] = why_not(module)
        if wrapped:
            reasons[module] = "DistributedDataParallel holds its weights already: pack before wrapping"
        elif module in adapters:
            reasons[module] = "it is an adapter, there to be trained"
        elif module in adapted:
            reasons[module] = "an adapter changes its weights in every step (PEFT's target_parameters)"
        elif reasons[module] is None and any(
            memory[module._parameters[name].untyped_storage()._cdata] > 1 for name in matrices(module)
        ):
            reasons[module] = "its weights share memory with another tensor of the model"
    for module, reason in list(reasons.items()):
        weights = [module._parameters[name] for name in matrices(module)] if reason is None else []
        for other in (holder for weight in weights for holder in holders[id(weight)]):
            if other is not module and projections(module):
                reasons[module] = f"its weights are tied to {paths[other]!r}"
                break
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


def _adapted(paths: dict[nn.Module, str]) -> set[nn.Module]:
    """The modules to whose parameters PEFT adds something while they run (its ``target_parameters``)."""
    adapted = set()
    for module in paths:
        if isinstance(getattr(module, "parameter_name", None), str):
            while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
                module = inner
            adapted.add(module)
    return adapted


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


def place(module: nn.Module, packed: Sequence[PackedMatrix]) -> None:
    """Makes the plain layer ``module`` the packed one around ``packed``, in the order of ``matrices``; the object and
    what hangs on it stay."""
    form = form_of(module)
    for name, matrix in zip(matrices(module), packed, strict=True):
        module._parameters[name] = matrix.parameter()
    module.__dict__["stands_for"] = type(module)
    module.__class__ = form


def settle(model: nn.Module) -> None:
    """Makes packed layers of the plain ones whose weights are packed matrices by now; a matrix that something else
    holds too is unpacked for all, and so are an experts module's of which one is not packed."""
    holders: dict[PackedMatrix, list[tuple[nn.Module, str]]] = {}
    modules = list(model.modules())
    for module in modules:
        for name, weight in module._parameters.items():
            if isinstance(weight, PackedMatrix):
                holders.setdefault(weight, []).append((module, name))
    fitting = {id(weight) for weight, places in holders.items() if _fits(weight, places)}
    plain: dict[int, nn.Parameter] = {}
    for module in modules:
        names = [name for name, weight in module._parameters.items() if isinstance(weight, PackedMatrix)]
        own = [module._parameters.get(name) for name in matrices(module)] if names else []
        if names and all(id(weight) in fitting for weight in own):
            place(module, own)
            continue
        for name in names:
            weight = module._parameters[name]
            if id(weight) not in plain:
                plain[id(weight)] = weight.plain_parameter()
            module._parameters[name] = plain[id(weight)]


def _fits(weight: PackedMatrix, places: list[tuple[nn.Module, str]]) -> bool:
    """Whether the packed forms of all modules that hold ``weight`` have it in this place, and as they store it."""
    alone = len(places) == 1
    return all(
        form_of(module) is not None
        and name in matrices(module)
        and transposed(module) == weight.transposed
        and (alone or not projections(module))
        for module, name in places
    )


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
