"""The step of ``fuse`` that lets layers decode from one cached tensor, and its undoing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gaugekit.hf.attention import interface
from gaugekit.hf.cache import probe
from gaugekit.hf.cache.attention import Angles, InputForward, SingleCacheForward, ValueForward
from gaugekit.models import Live
from gaugekit.models.single_cache import input_cache, texts, value_cache
from gaugekit.nn import ShapedAttention
from gaugekit.nn.single_cache import dense_weight

Make = Callable[[nn.Module], SingleCacheForward]
HOLDS = {"x": "input", "v": "values"}
BATCHING = "init_continuous_batching"


def refuse_pages(*_: Any, **__: Any) -> None:
    """What stands in the place of ``init_continuous_batching`` of a model that was fused."""
    raise ValueError(
        "continuous batching: expected a model that caches keys and values, which is what its pages hold, got one "
        "fused to cache one tensor; gaugekit.unfuse(model) first"
    )


@dataclass
class CacheStep:
    """Layers that can decode from their input (``cache`` "x") or from their values ("v") do so from now on.

    ``apply`` remembers here, as plain data, the paths of what it changed; ``undo`` puts it back.
    """

    cache: str
    forwards: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)

    def apply(self, model: nn.Module) -> dict[str, list]:
        """Returns what the report says: ``cached`` [{module, holds, bytes_before, bytes_after}], a token in each layer,
        and ``left`` [{module, reason}].
        """
        fields: dict[str, list] = {"cached": [], "left": []}
        blocks = {
            path: module for path, module in model.named_modules() if isinstance(module, ShapedAttention)
        }
        if blocks and self.cache == "x":
            self._read_inputs_of_blocks(blocks, fields)
        else:
            self._exchange(model, fields)
        for entry in fields["left"]:
            entry["reason"] = f"cache: {entry['reason']}"
        if (self.forwards or self.blocks) and hasattr(model, BATCHING):
            model.__dict__[BATCHING] = refuse_pages
        return fields

    def _exchange(self, model: nn.Module, fields: dict[str, list]) -> None:
        """Exchanges forwards wherever they can be, once a small model of the kind has been tried."""
        try:
            planned = self._planned(model, fields["left"])
            parts = list(texts(model).values()) if self.cache == "v" else [model]
            if planned and (reason := self._refused(parts)):
                raise ValueError(reason)
        except ValueError as reason:
            fields["left"].append({"module": "", "reason": str(reason)})
            return
        for path, forward in planned.items():
            forward.attention.__dict__["forward"] = forward.run
            self.forwards.append(path)
            fields["cached"].append(_entry(path, self.cache, forward.attention, *forward.numbers))

    def changed(self, model: nn.Module) -> bool:
        """Whether there is anything to undo."""
        return bool(self.forwards or self.blocks)

    def undo(self, model: nn.Module) -> list[str]:
        """Puts back the forwards; no module is exchanged, so none is named."""
        model.__dict__.pop(BATCHING, None)
        for path in self.forwards:
            model.get_submodule(path).__dict__.pop("forward", None)
        for path in self.blocks:
            model.get_submodule(path).__dict__.pop("single_cache", None)
        return []

    def _refused(self, parts: list[nn.Module]) -> str | None:
        """Why the model may not have it: a small one of its kind does not compute the same."""

        def swap(twin: nn.Module) -> None:
            for forward in self._planned(twin, []).values():
                forward.attention.__dict__["forward"] = forward.run

        verdicts = (probe.verdict(type(part), part.config, self.cache, swap) for part in parts)
        return next((reason for reason in verdicts if reason is not None), None)

    def _planned(self, model: nn.Module, left: list[dict]) -> dict[str, SingleCacheForward]:
        """{path of an attention: the forward it can have}; the others go to ``left``, with their reason. ValueError
        where the whole model can have none.
        """
        planned = {}
        for path, make in (_values(model) if self.cache == "v" else _inputs(model)).items():
            try:
                attention = model.get_submodule(path)
                forward = make(attention)
                _check_bare(attention)
                planned[path] = forward
            except (ValueError, AttributeError) as reason:
                left.append({"module": path, "reason": str(reason)})
        return planned

    def _read_inputs_of_blocks(self, blocks: dict[str, ShapedAttention], fields: dict[str, list]) -> None:
        for path, block in blocks.items():
            if reason := _no_inputs(block):
                fields["left"].append({"module": path, "reason": reason})
                continue
            block.single_cache = True
            self.blocks.append(path)
            before = block.width + block.key_groups * block.key_width
            fields["cached"].append(_entry(path, self.cache, block, before, block.width))


def _inputs(model: nn.Module) -> dict[str, Make]:
    """What makes the forward of each attention of ``model`` that is to cache its input, by its path."""
    live = Live(model)

    def make(layer: int, attention: nn.Module) -> SingleCacheForward:
        layout = input_cache(live.family, layer)
        for path in {*(cut.path for cut in layout.cuts.values()), layout.output}:
            _check_plain(path, attention.get_submodule(path.removeprefix(f"{layout.attention}.")))
        return InputForward(attention, layout)

    outputs = [live.family.modules(layer)["o"] for layer in range(len(live))]
    return {
        live.prefix + path.rpartition(".")[0]: functools.partial(make, layer)
        for layer, path in enumerate(outputs)
    }


def _values(model: nn.Module) -> dict[str, Make]:
    """What makes the forward of each attention of ``model`` that is to cache its values, by its path."""
    makers: dict[str, Make] = {}
    for path, text in texts(model).items():
        angles = functools.cache(
            functools.partial(Angles, text.rotary_emb)
        )  # a table for all layers of a kind

        def make(
            layer: int, attention: nn.Module, text: Any = text, angles: Any = angles
        ) -> SingleCacheForward:
            layout = value_cache(text, layer)
            return ValueForward(attention, angles(attention.layer_type), (layout.before, layout.after))

        for layer in range(len(text.layers)):
            name = f"{path}.layers.{layer}.self_attn".removeprefix(".")
            makers[name] = functools.partial(make, layer)
    if not makers:
        raise ValueError("no layer has keys that are its values (attention_k_eq_v, as in Gemma 4)")
    return makers


def _entry(path: str, cache: str, module: nn.Module, before: int, after: int) -> dict[str, Any]:
    size = next(
        parameter.dtype.itemsize for parameter in module.parameters() if parameter.is_floating_point()
    )
    return {
        "module": path,
        "holds": HOLDS[cache],
        "bytes_before": before * size,
        "bytes_after": after * size,
    }


def _no_inputs(block: ShapedAttention) -> str | None:
    """Why a block keeps keys and values, None where it need not."""
    if type(block) is not ShapedAttention:
        return f"a {type(block).__name__} computes its scores in a way of its own"
    if not block.causal:
        return "it sees tokens on both sides, so nothing is cached"
    if block.rotary_base is not None:
        return "it turns its keys by position (RoPE), and no query can take a rotation up that differs from key to key"
    try:
        if block.value is not None and len(dense_weight(block.value)) != block.width:
            return (
                "its heads share values, so keys and values are fewer numbers than the input, or hardly more"
            )
        if type(block.key) is not nn.Identity:
            dense_weight(block.key)
    except ValueError as reason:
        return str(reason)
    return None


def _check_bare(attention: nn.Module) -> None:
    """ValueError where ``attention`` is not what the model's class made it, or has another interface than ours."""
    if attention.config._attn_implementation != interface.NAME:
        raise ValueError(
            "it needs attn_implementation='gaugekit', whose masks say what is padding, and this model has another"
        )
    if "forward" in attention.__dict__ or hasattr(attention, "_hf_hook"):
        raise ValueError("its forward was exchanged already (accelerate's hooks do so)")
    if getattr(attention, "layer_idx", None) is None:
        raise ValueError("it has no layer_idx, which says which layer of the cache is its own")


def _check_plain(path: str, module: nn.Module) -> None:
    """ValueError unless ``module`` is a bare matrix that multiplies: the weights of keys and values are read raw."""
    bare = type(module).__module__.startswith(("torch.nn.", "transformers.pytorch_utils"))
    parameters = dict(module.named_parameters())
    if not bare or list(module.children()) or set(parameters) - {"weight", "bias"}:
        raise ValueError(f"{path} is no plain projection but a {type(module).__name__}")
    if not torch.is_floating_point(parameters["weight"]):
        raise ValueError(f"{path} holds {parameters['weight'].dtype}, no plain numbers")
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        raise ValueError(f"{path} has hooks, which would not be run")
