"""Forwards of attentions that decode from one cached tensor, put on instances; without a cache they are the model's.

A prompt attends as before, over keys and values that are projected (or turned) from what is cached and then dropped; a
step attends to the cache itself, by ``gaugekit.single_cache_attention``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.hf.attention import interface
from gaugekit.hf.attention.mask import Visible
from gaugekit.hf.cache.layers import single_layer
from gaugekit.hf.upstream import unfit
from gaugekit.models.single_cache import InputCache
from gaugekit.nn.single_cache import FEW, attend_inputs, watched
from gaugekit.ops.single_cache_attention.operator import rotated, single_cache_attention

try:
    # what a forward of transformers was asked to record beside its output
    from transformers.utils.output_capturing import _active_collector
except ImportError as error:
    raise unfit(__name__, error) from error

CACHES = ("cache", "past_key_values")
OTHER_SEQUENCE = ("encoder_hidden_states", "key_value_states")  # given, they make it cross-attention
DROPOUTS = ("attention_dropout", "attn_pdrop")


class SingleCacheForward(ABC):
    """Stands for the forward of ``attention``, one instance of a transformers module: ``run`` is called in its place.

    Whatever it needs it looks up at the module, so that the module may be moved, copied and saved. ``numbers``: those a
    token takes in the cache before and after.
    """

    def __init__(self, attention: nn.Module, numbers: tuple[int, int]):
        self.attention, self.numbers = attention, numbers
        self.names = tuple(inspect.signature(type(attention).forward).parameters)[2:]

    def run(self, hidden_states: Tensor, *given: Any, **said: Any) -> tuple[Tensor, None]:
        """As the module's own forward; ValueError for a cache, a mask or an argument that is not covered."""
        said |= dict(zip(self.names, given, strict=False))
        caches = [said[name] for name in CACHES if said.get(name) is not None]
        if any(said.get(name) is not None for name in OTHER_SEQUENCE):
            caches = []
        if "write_index" in said:
            raise ValueError(
                "cache: the pages of continuous batching hold keys and values, and this model was fused to cache one "
                "tensor; gaugekit.unfuse(model) first"
            )
        if caches and not torch.compiler.is_compiling() and "attentions" in (_active_collector.get() or ()):
            raise ValueError(
                "output_attentions: expected False, since no array of queries × keys is made where one tensor is "
                "cached; gaugekit.unfuse(model) first"
            )
        if not caches:
            return type(self.attention).forward(self.attention, hidden_states, **said)
        said = {
            name: value for name, value in said.items() if name not in CACHES and name not in OTHER_SEQUENCE
        }
        mask = said.pop("attention_mask", None)
        if mask is not None and (not isinstance(mask, Visible) or mask.cu_seqlens is not None):
            raise ValueError(
                "attention_mask: expected that of attn_implementation='gaugekit', which a single cache needs, got a "
                f"{'packed one' if isinstance(mask, Visible) else type(mask).__name__}; unfuse the model first"
            )
        cache = getattr(caches[0], "self_attention_cache", caches[0])
        single_layer(cache, self.attention.layer_idx)
        said["dropout"] = self._dropout() if self.attention.training else 0.0
        return self.attend(hidden_states, cache, mask, said), None

    @abstractmethod
    def attend(self, x: Tensor, cache: Any, mask: Visible | None, said: dict[str, Any]) -> Tensor:
        """The output [B, T, D] for x [B, T, D]; ``said`` are the other arguments of an attention function."""

    def _dropout(self) -> float:
        config = self.attention.config
        return next((getattr(config, name) for name in DROPOUTS if hasattr(config, name)), 0.0)


class InputForward(SingleCacheForward):
    """The cache holds the input: of keys and values, W_K is taken up by the query, and W_V comes after the sum."""

    def __init__(self, attention: nn.Module, layout: InputCache):
        super().__init__(attention, (layout.before, layout.after))
        self.layout = layout

    def attend(self, x: Tensor, cache: Any, mask: Visible | None, said: dict[str, Any]) -> Tensor:
        layout, attention = self.layout, self.attention
        q, k, v = (layout.cuts[part] for part in "qkv")
        modules = [self._module(cut.path) for cut in (q, k, v)]
        for module in modules:
            if module._modules or not isinstance(module.weight, nn.Parameter):
                raise ValueError(
                    f"cache: expected plain projections, got a {type(module).__name__}: unfuse first"
                )
            if watched(module):
                raise ValueError(
                    f"cache: expected plain projections, got a {type(module).__name__} with hooks, which would not be "
                    "run where one tensor is cached; gaugekit.unfuse(model) first"
                )
        queries = q.apply(modules[0], x)
        rows, mask = cache.update(x[:, None], None, attention.layer_idx, mask)
        if 1 <= x.shape[1] <= FEW and rows.shape[2] > x.shape[1]:
            interface.check(said, mask)
            queries, back = in_order(queries, mask)
            weights = k.weight(modules[1]), v.weight(modules[2]), v.bias(modules[2])
            y = back(attend_inputs(queries, rows, *weights, scale=layout.scale, **seen(mask))).transpose(1, 2)
        else:
            keys, values = k.apply(modules[1], rows[:, 0]), v.apply(modules[2], rows[:, 0])
            y, _ = interface.attend(attention, queries, keys, values, mask, scaling=layout.scale, **said)
        y = self._module(layout.output)(y.flatten(2))
        return y if layout.dropout is None else self._module(layout.dropout)(y)

    def _module(self, path: str) -> nn.Module:
        return self.attention.get_submodule(path.removeprefix(f"{self.layout.attention}."))


class ValueForward(SingleCacheForward):
    """The cache holds the values; keys are these times the gains of their norm, turned as they are read (Gemma 4)."""

    def __init__(self, attention: nn.Module, angles: Angles, numbers: tuple[int, int]):
        super().__init__(attention, numbers)
        self.angles = angles

    def attend(self, x: Tensor, cache: Any, mask: Visible | None, said: dict[str, Any]) -> Tensor:
        attention, count = self.attention, x.shape[1]
        queries, values = (
            norm(projection(x).unflatten(2, (-1, attention.head_dim))).transpose(1, 2)
            for norm, projection in (
                (attention.q_norm, attention.q_proj),
                (attention.v_norm, attention.k_proj),
            )
        )
        shared = said.pop("shared_kv_states", None)
        said.pop("position_embeddings", None)
        wanted = said.pop("return_shared_kv_states", False) and attention.store_full_length_kv
        rows, mask = cache.update(values, None, attention.layer_idx, mask, said.get("position_ids"))
        cos, sin = self.angles.tables(rows.shape[2], rows)
        place = _places(mask, count, x.device).clamp(0, rows.shape[2] - 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        queries = rotated(queries.to(wide), None, cos[place][:, None], sin[place][:, None]).to(rows.dtype)
        gain, few = attention.k_norm.weight, count <= FEW and rows.shape[2] > count
        if wanted or not few:
            keys = rotated(rows.to(wide), gain, cos, sin).to(rows.dtype)
        if wanted:
            shared[attention.layer_type] = keys, rows
        if few:
            interface.check(said, mask)
            queries, back = in_order(queries, mask)
            tables = {"key_gain": gain, "cos": cos, "sin": sin}
            y = single_cache_attention(queries, rows, scale=attention.scaling, **tables, **seen(mask))
            y = back(y).transpose(1, 2)
        else:
            y, _ = interface.attend(attention, queries, keys, rows, mask, scaling=attention.scaling, **said)
        return attention.o_proj(y.flatten(2))


class Angles:
    """cos and sin [P, R/2] of the first P positions for the layers of type ``kind``, with ``rotary`` the model's module
    that knows the frequencies; made once and shared by those layers.
    """

    def __init__(self, rotary: nn.Module, kind: str):
        self.rotary, self.kind = rotary, kind
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def tables(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of at least ``rows`` positions, float32 (float64 beside float64), on the device of ``like``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        table = self.cos
        if table is None or len(table) < rows or (table.device, table.dtype) != (like.device, dtype):
            frequency = getattr(self.rotary, f"{self.kind}_inv_freq").to(like.device, torch.float32)
            turning = max(1, int((frequency != 0).sum()))
            position = torch.arange(rows + rows // 2, device=like.device, dtype=torch.float32)
            angle = position[:, None] * frequency[:turning]
            self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return self.cos[:rows], self.sin[:rows]


def seen(mask: Visible) -> dict[str, Any]:
    """``mask`` as arguments of ``single_cache_attention``."""
    return {
        "causal": mask.causal,
        "window": mask.window,
        "query_start": mask.query_start,
        "key_lengths": mask.key_lengths,
    }


def in_order(queries: Tensor, mask: Visible) -> tuple[Tensor, Any]:
    """The queries [B, H, T, C], the real ones first, and the function that puts outputs back in place."""
    if mask.query_order is None or queries.shape[2] == 1:
        return queries, lambda y: y
    order = mask.query_order.to(queries.device)
    return interface.gather(queries, order), lambda y: interface.gather(y, order.argsort(1))


def _places(mask: Visible, count: int, device: torch.device) -> Tensor:
    """The rows at which the ``count`` queries stand, [B or 1, T]; anything below 0 or past the end for padding."""
    row = torch.arange(count, device=device)[None]
    if mask.query_order is not None and count > 1:
        row = mask.query_order.to(device).argsort(1)
    if mask.query_start is None:
        return row + mask.keys - count
    return row + mask.query_start.to(device)[:, None]
