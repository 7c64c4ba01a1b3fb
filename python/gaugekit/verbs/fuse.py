"""Swaps layers of one live model for compact forms and our attention, and back again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.checkpoint import install, resident
from gaugekit.checkpoint.compact import forms as forms_of
from gaugekit.checkpoint.version import VERSION
from gaugekit.models import Live, Stored, rounded
from gaugekit.nn import forms
from gaugekit.nn.gauge_projection import GaugeProjection
from gaugekit.nn.packed_layer import PackedLayer
from gaugekit.ops.packed_linear.choice import speed_note
from gaugekit.report import Report
from gaugekit.symmetry import GaugeFix
from gaugekit.verbs import wording

CACHES = ("x", "v")


@torch.no_grad()
def fuse(
    model: nn.Module,
    *,
    gauge: bool | None = None,
    rows: str | None = None,
    attention: bool = True,
    packed: bool = False,
    neutreno: float | Sequence[float] | None = None,
    cache: str | None = None,
) -> Report:
    """Makes this instance lighter, the function it computes unchanged; no class and no other instance is touched.

    ``gauge`` (the default unless ``packed`` or ``cache``): in every layer the key and value projections become compact
    forms without what nobody can observe (see ``symmetry.GaugeFix``; float64, rounded once), and the query and output
    projections take up the rest; query and key channels that ``rank.truncate`` left at zero are no longer stored.
    ``rows`` is how a gauge is fixed, "balanced" unless given; "triangular" removes half as much and lets no rounding
    error grow (docs/gauge.md).
    ``attention``: the model attends through ``gaugekit.shaped_attention`` (transformers' interface, named "gaugekit").
    The originals are kept on the instance for ``unfuse``: fusing saves memory in what is saved and loaded again, not in
    this process. A fused model saves with ``save_pretrained`` and loads like a converted one. Move it or train it
    freely, but build an optimizer after fusing: the parameters are new ones. Our attention refuses dropout on its
    probabilities, so fuse with ``attention=False`` to train a model that asks for it.

    ``packed``: plain linear layers, GPT-2's Conv1D, embeddings and the experts of mixtures keep weights of bfloat16 or
    float16, and linear layers of float8_e5m2, packed in memory and frozen, bit for bit (docs/resident.md); each layer
    stays the same object, with its hooks, attributes and ties. Nothing is kept for ``unfuse``, which unpacks whatever
    is packed, so the memory is saved in this process. The model saves as the plain one. The report then has
    ``bytes_before`` and ``bytes_after`` of all parameters and buffers and ``plain_in_vectors``, how many numbers of
    norms and biases stay plain; ``speed`` [sentence] says what is known of packed products on this kind of processor;
    ``left`` names every other module that holds a plain matrix.

    ``neutreno``: λ, a number or one a layer (the first is not used): above the first layer attention becomes
    softmax(Q Kᵀ) V + λ (V⁰ − V), V⁰ the first layer's values of the same token (docs/neutreno.md). This changes the
    function unless λ = 0, ties the gauges of all layers, and so comes without ``gauge``. BERT, RoBERTa, GPT-2, Llama,
    Mistral, Qwen2, ViT and DeiT; gradient checkpointing needs ``use_reentrant=False``. ``save_pretrained`` keeps λ in
    config.json, and ``from_pretrained`` fuses again once ``gaugekit.integrations.transformers`` is imported.

    ``cache``: while it generates a layer keeps one tensor a token in place of keys and values, half of the bytes, where
    it can (docs/single_cache.md): "x", its input (GPT-2, OPT, the decoders of BART and Whisper, SAS blocks: heads with
    keys of their own, which no position turns), or "v", its values, where keys are these, scaled and turned (Gemma 4's
    ``attention_k_eq_v``). It needs our attention and plain projections, so it comes without ``gauge``. Afterwards
    caches that were begun before are refused, and so is continuous batching. The report then has ``cached`` [{module,
    holds, bytes_before, bytes_after}], in bytes a token.

    What cannot be replaced is left as it was and reported with the reason; a model of an unknown family, too: fusing
    is an optimisation, and a pipeline should not stop for want of one. Returns a Report: ``replaced`` [{module, form}],
    ``rewritten`` [module: dense, new weights], ``attention`` (the implementation in use, None where not known),
    ``left`` [{module, reason}], ``products`` [{module, product, reason}]: whether a compact projection runs our kernel
    ("kernel") or torch's product with its dense weight ("dense"), and why, ``parameters_before``,
    ``parameters_after``. Raises ValueError where ``model`` is no nn.Module, for ``gauge`` and ``packed`` together, for
    ``rows`` that are no choice or without ``gauge``, for ``neutreno`` with ``gauge``, without ``attention`` or not
    finite numbers, and for ``cache`` that is no choice or beside ``gauge`` or ``neutreno``.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected an nn.Module, got {type(model).__name__}")
    if gauge and packed:
        raise ValueError("gauge, packed: expected one of them, got both: compact forms are not packed")
    if neutreno is not None and (gauge or not attention):
        raise ValueError(
            "neutreno: expected with attention and without gauge: it ties the values of all layers"
        )
    if cache is not None and (cache not in CACHES or gauge or neutreno is not None):
        raise ValueError(
            f"cache: expected None, or one of {', '.join(CACHES)} without gauge and neutreno, got {cache!r}"
        )
    gauge = not packed and neutreno is None and cache is None if gauge is None else gauge
    if rows is not None and not gauge:
        raise ValueError(f"rows: expected beside gauge, got {rows!r} without it")
    fix = GaugeFix(rows or "balanced")
    fields: dict[str, Any] = {"replaced": [], "rewritten": [], "attention": None, "left": []}
    if cache is not None:
        fields["cached"] = []
    fields["parameters_before"] = _count(model)
    if install.fused(model):
        fields["left"].append({"module": "", "reason": wording.ALREADY})
    else:
        steps: list[Any] = [GaugeStep(fix)] if gauge else []
        for step in steps:
            _apply(step, model, fields)
        if packed:
            _pack(model, fields)
        if attention:
            steps += _attend(model, neutreno, fields)
        if cache is not None:
            steps += _cache(model, cache, fields)
        if steps := [step for step in steps if step.changed(model)]:
            install.remember(model, steps)
    fields["attention"] = _attention(model)
    fields["products"] = _products(model)
    fields["parameters_after"] = _count(model)
    notes = _notes(model, fields["left"])
    if packed and not fields["replaced"]:
        notes.insert(0, _why_nothing(model))
    return wording.fused(Report("fuse", fields, notes), model)


def unfuse(model: nn.Module) -> Report:
    """Puts back what ``fuse`` replaced: the very modules, their weights bit for bit, and the attention implementation.

    Packed layers become plain ones, whichever way they were packed. Modules follow the model to another device or
    dtype; what the forms learnt since is dropped. Returns a Report:
    ``restored`` [module], ``attention``; nothing is restored in a model that is not fused. Raises ValueError where
    ``model`` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected an nn.Module, got {type(model).__name__}")
    unpacked = resident.unpack(model)
    notes = [] if unpacked or install.fused(model) else ["the model is not fused"]
    restored = [*install.undo(model), *unpacked]
    report = Report("unfuse", {"restored": restored, "attention": _attention(model)}, notes)
    return wording.unfused(report, model)


@dataclass
class GaugeStep:
    """Compact forms in place of the projections of every layer, as ``fix`` has it; ``modules`` are the originals, by
    name, ``entries`` the parts of the config that tell of the forms ("": the whole).
    """

    fix: GaugeFix
    modules: dict[str, nn.Module] = field(default_factory=dict)
    entries: list[str] = field(default_factory=list)

    def apply(self, model: nn.Module) -> dict[str, list]:
        """Replaces what can be replaced, and returns what the report says: ``replaced``, ``rewritten``, ``left``."""
        fields: dict[str, list] = {"replaced": [], "rewritten": [], "left": []}
        try:
            live = Live(model)
        except ValueError as reason:
            return {"left": [{"module": "", "reason": str(reason)}]}
        if live.config.get("quantization_config"):
            method = live.config["quantization_config"].get("quant_method")
            return {"left": [{"module": "", "reason": f"its weights are stored as {method!r} already"}]}
        specs: dict[str, dict] = {}
        for layer in range(len(live)):
            try:
                originals, replacements, stored = _replacements(live, layer, self.fix)
            except (ValueError, AttributeError) as reason:
                block = live.prefix + live.family.block(layer)
                fields["left"].append({"module": block, "reason": str(reason)})
                continue
            for path, module in replacements.items():
                name = live.prefix + path
                self.modules[name] = originals[path]
                model.set_submodule(name, module)
                if path in stored.modules:
                    fields["replaced"].append({"module": name, "form": stored.modules[path]["form"]})
                else:
                    fields["rewritten"].append(name)
            specs |= stored.modules
        if specs:
            configs = {"": specs, **live.family.inside(specs)}
            for entry, modules in configs.items():
                config = getattr(model.config, entry) if entry else model.config
                config.quantization_config = {
                    "quant_method": "gaugekit",
                    "version": VERSION,
                    "modules": modules,
                }
            self.entries = list(configs)
        return fields

    def changed(self, model: nn.Module) -> bool:
        """Whether there is anything to undo."""
        return bool(self.modules)

    def undo(self, model: nn.Module) -> list[str]:
        """Puts the originals back, on the device and in the dtype and mode of what took their place."""
        for path, original in self.modules.items():
            fused = model.get_submodule(path)
            first = next(fused.parameters())
            model.set_submodule(path, original.to(first.device, first.dtype).train(fused.training))
        for entry in self.entries:
            config = getattr(model.config, entry) if entry else model.config
            config.__dict__.pop("quantization_config", None)
        return list(self.modules)


def _replacements(
    live: Live, layer: int, fix: GaugeFix
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], Stored]:
    """(originals, replacements, how they are stored) of one layer's projections, by path; ValueError with the reason
    where they cannot be replaced.
    """
    paths = dict.fromkeys(live.family.projections(layer).values())
    originals = {path: live.model.get_submodule(live.prefix + path) for path in paths}
    for path, original in originals.items():
        _check_plain(path, original)
    view = fix.layer(live.attention(layer))
    stored = live.family.store(layer, view, forms_of(view))
    return originals, {path: _make(path, original, stored) for path, original in originals.items()}, stored


def _apply(step: Any, model: nn.Module, fields: dict) -> None:
    for name, entries in step.apply(model).items():
        fields[name] += entries


def _pack(model: nn.Module, fields: dict) -> None:
    done = resident.pack(model)
    fields["replaced"] += [{"module": path, "form": form} for path, form in done.packed.items()]
    fields["left"] += [{"module": path, "reason": reason} for path, reason in done.left.items()]
    fields["bytes_before"], fields["bytes_after"] = done.bytes_before, done.bytes_after
    fields["plain_in_vectors"] = done.vectors
    layers = [model.get_submodule(path) for path in done.packed]
    dtypes = {weight.dtype for layer in layers for weight in layer.packed_weights().values()}
    fields["speed"] = [speed_note(dtype) for dtype in sorted(dtypes, key=str)]


def _attend(model: nn.Module, lam, fields: dict) -> list[Any]:
    """The step that gave ``model`` our attention, in a list; nothing where there is no interface to set."""
    if not hasattr(model, "set_attn_implementation"):  # then transformers need not be installed either
        reason = "attention: it is no transformers model, so there is no interface to set"
        fields["left"].append({"module": "", "reason": reason})
        return []
    from gaugekit.hf.attention.step import AttentionStep

    step = AttentionStep(lam)
    _apply(step, model, fields)
    return [step]


def _cache(model: nn.Module, cache: str, fields: dict) -> list[Any]:
    """The step that lets layers of ``model`` cache one tensor, in a list; nothing without transformers."""
    try:
        from gaugekit.hf.cache.step import CacheStep
    except ImportError as error:
        fields["left"].append({"module": "", "reason": f"cache: {error}"})
        return []
    step = CacheStep(cache)
    _apply(step, model, fields)
    return [step]


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
        replacement = forms.build(stored.modules[path], device=weight.device, dtype=weight.dtype)
        _fill(path, replacement, tensors)
        replacement.requires_grad_(weight.requires_grad)
    else:
        replacement = copy.deepcopy(original)
        _fill(path, replacement, tensors)
    return replacement.train(original.training)


def _fill(path: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    module.load_state_dict(
        {name: rounded(f"{path}.{name}", tensor, dtypes[name]) for name, tensor in tensors.items()}
    )


def _notes(model: nn.Module, left: list[dict[str, str]]) -> list[str]:
    """One sentence for each reason why modules were left alone, with the first of them."""
    modules: dict[str, list[str]] = {}
    for entry in left:
        modules.setdefault(entry["reason"], []).append(entry["module"] or type(model).__name__)
    return [
        f"left alone: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
        for reason, names in modules.items()
    ]


def _why_nothing(model: nn.Module) -> str:
    """Why ``packed`` packed nothing: where the weights have no dtype that is packed, how to give them one."""
    dtypes = {p.dtype for p in model.parameters() if p.dim() > 1 and p.is_floating_point()}
    names = (
        ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        or "no floating-point numbers"
    )
    if dtypes & {*resident.DTYPES, resident.E5M2, *resident.REFUSED}:
        return "nothing was packed: see the reasons below"
    return (
        f"nothing was packed: packing takes bfloat16 and float16, and the matrices of this model are {names}; "
        "model.to(torch.bfloat16) first, where rounding them is acceptable"
    )


def _products(model: nn.Module) -> list[dict[str, str]]:
    """How every compact projection is multiplied, and why so."""
    projections = ((name, m) for name, m in model.named_modules() if isinstance(m, GaugeProjection))
    return [
        {"module": name, "product": product, "reason": reason}
        for name, (product, reason) in ((name, m.product) for name, m in projections)
    ]


def _attention(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
