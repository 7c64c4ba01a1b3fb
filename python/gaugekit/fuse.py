"""Swaps layers of one live model for compact forms and our attention, and back again.

``gaugekit.fuse(model)`` is the verb; this module is callable so that the name means the same whatever was imported.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .models import Live
from .nn import forms, packing
from .nn.packed_layer import PackedLayer
from .ops.packed_linear_plan import speed_note
from .rank import compact
from .report import Report
from .rewrite import VERSION
from .symmetry import GaugeFix

RECORD = "_gaugekit_fused"


@dataclass
class _Undo:
    """What a fused instance was before; it stands on the instance, as plain data that no state_dict shows."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    attention: str | None = None
    attentions: dict[str, Any] = field(default_factory=dict)
    taps: list[str] = field(default_factory=list)
    neutreno: bool = False
    quantization_config: Any = None


@torch.no_grad()
def fuse(
    model: nn.Module,
    *,
    gauge: bool | None = None,
    attention: bool = True,
    packed: bool = False,
    neutreno: float | Sequence[float] | None = None,
) -> Report:
    """Makes this instance lighter, the function it computes unchanged; no class and no other instance is touched.

    ``gauge`` (the default unless ``packed``): in every layer the key and value projections become compact forms
    without what nobody can observe (see ``symmetry.GaugeFix``; float64, rounded once), and the query and output
    projections take up the rest; query and key channels that ``rank.truncate`` left at zero are no longer stored.
    ``attention``: the model attends through ``gaugekit.shaped_attention`` (transformers' interface, named "gaugekit").
    The originals are kept on the instance for ``unfuse``: fusing saves memory in what is saved and loaded again, not in
    this process. A fused model saves with ``save_pretrained`` and loads like a converted one. Move it or train it
    freely, but build an optimizer after fusing: the parameters are new ones. Our attention refuses dropout on its
    probabilities, so fuse with ``attention=False`` to train a model that asks for it.

    ``packed``: plain linear layers, GPT-2's Conv1D and embeddings of bfloat16 or float16 keep their weights packed in
    memory and frozen, bit for bit (docs/packed.md); each layer stays the same object, with its hooks, attributes and
    ties. Nothing is kept for ``unfuse``, which unpacks whatever is packed, so the memory is saved in this process. The
    model saves as the plain one. The report then has ``bytes_before`` and ``bytes_after`` of all parameters and buffers
    and ``plain_in_vectors``, how many numbers of norms and biases stay plain; ``speed`` [sentence] says what is known
    of packed products on this kind of processor; ``left`` names every other module that holds a plain matrix.

    ``neutreno``: λ, a number or one a layer (the first is not used): above the first layer attention becomes
    softmax(Q Kᵀ) V + λ (V⁰ − V), V⁰ the first layer's values of the same token (docs/neutreno.md). This changes the
    function unless λ = 0, ties the gauges of all layers, and so comes without ``gauge``. BERT, RoBERTa, GPT-2, Llama,
    Mistral, Qwen2, ViT and DeiT; gradient checkpointing needs ``use_reentrant=False``. ``save_pretrained`` keeps λ in
    config.json, and ``from_pretrained`` fuses again once ``gaugekit.integrations.transformers`` is imported.

    What cannot be replaced is left as it was and reported with the reason; a model of an unknown family, too: fusing
    is an optimisation, and a pipeline should not stop for want of one. Returns a Report: ``replaced`` [{module, form}],
    ``rewritten`` [module: dense, new weights], ``attention`` (the implementation in use, None where not known),
    ``left`` [{module, reason}], ``parameters_before``, ``parameters_after``. Raises ValueError where ``model`` is no
    nn.Module, for ``gauge`` and ``packed`` together, and for ``neutreno`` with ``gauge``, without ``attention`` or not
    finite numbers.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected an nn.Module, got {type(model).__name__}")
    if gauge and packed:
        raise ValueError("gauge, packed: expected one of them, got both: compact forms are not packed")
    if neutreno is not None and (gauge or not attention):
        raise ValueError(
            "neutreno: expected with attention and without gauge: it ties the values of all layers"
        )
    gauge = not packed and neutreno is None if gauge is None else gauge
    fields: dict[str, Any] = {"replaced": [], "rewritten": [], "attention": None, "left": []}
    fields["parameters_before"] = _count(model)
    undo = model.__dict__.get(RECORD)
    if undo is not None:
        fields["left"].append({"module": "", "reason": "it is fused already; unfuse it first"})
    else:
        undo = _Undo(attention=_attention(model))
        if gauge:
            _fuse_gauge(model, fields, undo)
        if packed:
            _fuse_packed(model, fields)
        if attention:
            _fuse_attention(model, fields, undo, neutreno)
        if undo.modules or undo.neutreno or _attention(model) != undo.attention:
            model.__dict__[RECORD] = undo
    fields["attention"] = _attention(model)
    fields["parameters_after"] = _count(model)
    notes = [
        f"left alone: {one['module'] or type(model).__name__}: {one['reason']}" for one in fields["left"]
    ]
    return Report("fuse", fields, notes)


def unfuse(model: nn.Module) -> Report:
    """Puts back what ``fuse`` replaced: the very modules, their weights bit for bit, and the attention implementation.

    Packed layers become plain ones, whichever way they were packed. Modules follow the model to another device or
    dtype; what the forms learnt since is dropped. Returns a Report:
    ``restored`` [module], ``attention``; nothing is restored in a model that is not fused. Raises ValueError where
    ``model`` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected an nn.Module, got {type(model).__name__}")
    unpacked = packing.unpack(model)
    undo = model.__dict__.pop(RECORD, None)
    if undo is None:
        notes = [] if unpacked else ["the model is not fused"]
        return Report("unfuse", {"restored": unpacked, "attention": _attention(model)}, notes)
    for path, original in undo.modules.items():
        fused = model.get_submodule(path)
        first = next(fused.parameters())
        model.set_submodule(path, original.to(first.device, first.dtype).train(fused.training))
    if undo.modules or undo.neutreno:
        if undo.quantization_config is None:
            model.config.__dict__.pop("quantization_config", None)
        else:
            model.config.quantization_config = undo.quantization_config
    if undo.taps or undo.neutreno:
        from .integrations import attention, neutreno

        attention.remove_taps(model, undo.taps)
        neutreno.detach(model)
    if undo.attention is not None and undo.attention != _attention(model):
        model.set_attn_implementation(undo.attentions)
    return Report("unfuse", {"restored": [*undo.modules, *unpacked], "attention": _attention(model)})


def _fuse_gauge(model: nn.Module, fields: dict, undo: _Undo) -> None:
    try:
        live = Live(model)
    except ValueError as reason:
        fields["left"].append({"module": "", "reason": str(reason)})
        return
    if live.config.get("quantization_config"):
        method = live.config["quantization_config"].get("quant_method")
        fields["left"].append({"module": "", "reason": f"its weights are stored as {method!r} already"})
        return
    rewrite, modules = GaugeFix(), {}
    for layer in range(len(live)):
        paths = dict.fromkeys(live.family.projections(live.config, layer).values())
        try:
            originals = {path: model.get_submodule(live.prefix + path) for path in paths}
            for path, original in originals.items():
                _check_plain(path, original)
            view = rewrite.layer(live.attention(layer))
            stored = live.family.store(live.config, layer, view, compact(view) | rewrite.form(view))
            made = {path: _make(path, original, stored) for path, original in originals.items()}
        except (ValueError, AttributeError) as reason:
            fields["left"].append({"module": live.prefix + live.family.block(layer), "reason": str(reason)})
            continue
        for path, module in made.items():
            name = live.prefix + path
            undo.modules[name] = originals[path]
            model.set_submodule(name, module)
            if path in stored.modules:
                fields["replaced"].append({"module": name, "form": stored.modules[path]["form"]})
            else:
                fields["rewritten"].append(name)
        modules |= stored.modules
    if modules:
        model.config.quantization_config = {
            "quant_method": "gaugekit",
            "version": VERSION,
            "modules": modules,
        }


def _fuse_packed(model: nn.Module, fields: dict) -> None:
    done = packing.pack(model)
    fields["replaced"] += [{"module": path, "form": form} for path, form in done.packed.items()]
    fields["left"] += [{"module": path, "reason": reason} for path, reason in done.left.items()]
    fields["bytes_before"], fields["bytes_after"] = done.bytes_before, done.bytes_after
    fields["plain_in_vectors"] = done.vectors
    dtypes = {model.get_submodule(path).weight.dtype for path in done.packed}
    fields["speed"] = [speed_note(dtype) for dtype in sorted(dtypes, key=str)]


def _fuse_attention(model: nn.Module, fields: dict, undo: _Undo, lam) -> None:
    if not hasattr(model, "set_attn_implementation"):  # then transformers need not be installed either
        reason = "attention: it is no transformers model, so there is no interface to set"
        fields["left"].append({"module": "", "reason": reason})
        return
    from .integrations import attention as ours
    from .integrations import neutreno, probe

    if lam is not None:
        try:
            neutreno.check(model.config)
        except ValueError as reason:
            fields["left"].append({"module": "", "reason": str(reason)})
            return
        lam = neutreno.numbers(model.config, lam)
        undo.quantization_config = getattr(model.config, "quantization_config", None)
    undo.attentions = _attentions(model.config)
    if reason := probe.adopt(model):
        fields["left"].append({"module": "", "reason": f"attention: {reason}"})
        return
    undo.taps = ours.add_taps(model)
    if lam is not None:
        neutreno.attach(model, lam)
        undo.neutreno = True
        try:
            model.config.quantization_config = neutreno.stored(undo.quantization_config, lam)
        except ValueError as reason:
            fields["left"].append({"module": "", "reason": str(reason)})


def _check_plain(path: str, module: nn.Module) -> None:
    """Only a bare projection may go: anything hung on it (adapters, hooks, offloading) would be lost."""
    if isinstance(module, PackedLayer):
        raise ValueError(f"{path} is packed: compact forms are not packed, so unfuse it first")
    if list(module.children()) or set(dict(module.named_parameters())) - {"weight", "bias"}:
        raise ValueError(f"{path} is no plain projection but a {type(module).__name__} with more inside")
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or hasattr(module, "_hf_hook")
    ):
        raise ValueError(f"{path} has hooks, which its replacement would not run")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(f"{path} holds no numbers (meta device)")


def _make(path: str, original: nn.Module, stored: Any) -> nn.Module:
    """The replacement of one projection: a form, or the same class with the rewritten weights."""
    tensors = {
        name[len(path) + 1 :]: tensor
        for name, tensor in stored.tensors.items()
        if name.startswith(path + ".")
    }
    weight = original.weight
    if path in stored.modules:
        made = forms.build(stored.modules[path], device=weight.device, dtype=weight.dtype)
        _fill(made, tensors)
        made.requires_grad_(weight.requires_grad)
    else:
        made = copy.deepcopy(original)
        _fill(made, tensors)
    return made.train(original.training)


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict(
        {name: tensor.to(module.state_dict()[name].dtype) for name, tensor in tensors.items()}
    )


def _attention(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _attentions(config: Any) -> dict[str, Any]:
    """The implementation of a config and of those within, as ``set_attn_implementation`` takes them."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    return {"": config._attn_implementation} | {name: _attentions(part) for name, part in parts.items()}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class _Verb(types.ModuleType):
    """Makes ``gaugekit.fuse(model)`` work although importing this module binds the name to the module."""

    __call__ = staticmethod(fuse)


sys.modules[__name__].__class__ = _Verb
