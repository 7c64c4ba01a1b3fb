"""Which layers of a live model can decode from one cached tensor, and where its parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gaugekit.models.family import Family
from gaugekit.models.view import POSITIONS, AttentionView, Cut

KEYS_ARE_VALUES = ("gemma4_text",)  # the model types with layers of one projection for keys and values
STATIC_ROPE = ("default", "linear", "proportional", "llama3")  # angles that do not change while a text grows


@dataclass(frozen=True)
class InputCache:
    """A layer whose keys and values can be read off its input: ``attention``, the path of the whole, the ``cuts`` of q,
    k and v, the ``output`` and a ``dropout`` behind it, all paths in the base model; ``before`` and ``after``: how many
    numbers a token takes in the cache.
    """

    attention: str
    cuts: dict[str, Cut]
    output: str
    scale: float
    dropout: str | None
    before: int
    after: int


def input_cache(family: Family, layer: int) -> InputCache:
    """How layer ``layer`` decodes from its input; ValueError, with the reason, where it cannot."""
    view = family.outline(layer)
    if reason := _no_input_cache(view):
        raise ValueError(reason)
    before = view.groups * (view.k.weight.shape[2] + view.v.weight.shape[2])
    after = view.k.weight.shape[1]
    if after >= before:
        raise ValueError(f"its input is {after} numbers a token, no fewer than keys and values, {before}")
    output = family.modules(layer)["o"]
    return InputCache(
        attention=output.rpartition(".")[0],
        cuts=family.cuts(layer),
        output=output,
        scale=view.scale,
        dropout=family.dropout(layer),
        before=before,
        after=after,
    )


def _no_input_cache(view: AttentionView) -> str | None:
    if view.cross:
        return "cross-attention reads the encoder's output, whose keys and values never grow"
    if not view.causal:
        return "it sees tokens on both sides, so nothing is cached"
    if view.rotary:
        return "it turns its keys by position (RoPE), and no query can take a rotation up that differs from key to key"
    if view.repeats > 1:
        return f"{view.repeats} heads share keys and values, so those are fewer numbers than the input, or hardly more"
    if view.slopes is not None or view.shared_bias is not None or POSITIONS in view.barred.values():
        return "its scores hold a bias of position, which the operator does not add"
    if view.softcap is not None:
        return "it caps its scores, which the operator does not"
    if view.norms is not None or view.barred.get("query_key"):
        return "it normalises its keys, which are then no matter of W_K alone"
    return None


@dataclass(frozen=True)
class ValueCache:
    """A layer whose keys are its values, scaled and turned: ``attention``, the path in the model that holds its
    ``rotary`` module, and the numbers a token takes ``before`` and ``after``.
    """

    attention: str
    before: int
    after: int


def texts(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a live model, by path, that may have layers whose keys are their values."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "rotary_emb")
        and hasattr(module, "layers")
        and getattr(getattr(module, "config", None), "model_type", None) in KEYS_ARE_VALUES
    }


def value_cache(text: nn.Module, layer: int) -> ValueCache:
    """How layer ``layer`` of ``text`` decodes from its values; ValueError, with the reason, where it cannot."""
    attention = text.layers[layer].self_attn
    if reason := _no_value_cache(text, attention):
        raise ValueError(reason)
    heads = text.config.num_attention_heads // attention.num_key_value_groups
    width = heads * attention.head_dim
    return ValueCache(f"layers.{layer}.self_attn", 2 * width, width)


def _no_value_cache(text: nn.Module, attention: Any) -> str | None:
    kind = attention.layer_type
    if attention.is_kv_shared_layer:
        return "it reads the keys and values of an earlier layer, and caches none"
    if attention.is_sliding:
        return "it sees the last tokens only, so its cache does not grow"
    if attention.v_proj is not None:
        return "its values have a projection of their own (attention_k_eq_v is false)"
    if not attention.is_causal:
        return "it sees tokens on both sides, so nothing is cached"
    if attention.store_full_length_kv and text.config.num_kv_shared_layers:
        return "later layers read its keys, which would have to be turned for them at every step"
    rope = text.rotary_emb.rope_type[kind]
    if rope not in STATIC_ROPE or getattr(text.rotary_emb, f"{kind}_attention_scaling") != 1:
        return f"its angles of position are of type {rope!r}, which are scaled, or change while a text grows"
    if attention.k_norm.eps != attention.v_norm.eps:
        return "the norms of its keys and of its values differ"
    return None
