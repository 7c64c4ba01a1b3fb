"""Experts of a mixture whose weights stay packed in memory: those that no token is routed to are not decoded."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from gaugekit.nn.packed_layer import PackedLayer
from gaugekit.nn.packed_matrix import PackedMatrix
from gaugekit.ops.operands import autocast_dtype
from gaugekit.ops.packed_linear.experts import packed_experts

# What transformers' experts interface knows by itself: different orders of the same products.
IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")


def projections(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights [experts, outputs, inputs] of ``module``, where transformers' experts interface computes
    it (``use_experts_implementation``: Mixtral, Qwen-MoE, gpt-oss, DeepSeek-V3, ...); none for any other module."""
    forward = type(module).forward
    interface = getattr(forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"
    if not interface or not hasattr(forward, "__wrapped__") or "has_gate" not in module.__dict__:
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


class PackedExperts(PackedLayer):
    """Σ over a token's experts of w · down(act(up(x))), their weights frozen in the layout of docs/resident.md.

    Stands in the place of an experts module of transformers, as a subclass of its class (``packed_class``), whose
    activation, gate, biases and layout it keeps. hidden_states [T, D], top_k_index int64 [T, k], top_k_weights [T, k]
    -> [T, D]. Rows are sorted by expert and each group is one ``packed_linear``; a token's products are added in the
    order of top_k, as transformers' "grouped_mm" and "batched_mm" add them, whatever the config names. An index that is
    no expert's counts for nothing. A plain weight in the place of a packed one makes transformers compute the whole.
    """

    form = "packed_experts"

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up, down = "gate_up_proj" if self.has_gate else "up_proj", "down_proj"
        if not all(isinstance(getattr(self, name), PackedMatrix) for name in (up, down)):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        count, top_k = getattr(self, down).shape[0], top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).long().sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True)
        stray = ((experts < 0) | (experts >= count))[:, None]
        experts = experts.clamp(0, count - 1)
        # copies first, then a permutation: the gradient of a row adds up in one order
        x = hidden_states.repeat_interleave(top_k, 0)[order]
        y = self._product(up, x, ends, experts)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = self._product(down, y, ends, experts)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y.masked_fill(stray, 0)  # a bias was added to these rows, too
        y = y * top_k_weights.reshape(-1, 1)[order]
        y = y[order.argsort()].view(*top_k_index.shape, y.shape[-1]).sum(-2)
        return y.to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        weight, kind = getattr(self, name).value, autocast_dtype(x)
        if kind is not None:
            x = x.to(kind) if kind in weight.operands else x.to(kind).float()
        y = packed_experts(x, weight, ends)
        if self.has_bias:
            y = y + embedding(experts, getattr(self, f"{name}_bias").to(y.dtype))
        return y if kind is None else y.to(kind)

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.__dict__["stands_for"],), *state


@functools.cache
def packed_class(kind: type[nn.Module]) -> type[PackedExperts]:
    """The class of packed experts that stand for those of class ``kind``."""
    return type(f"Packed{kind.__name__}", (PackedExperts, kind), {"__module__": __name__})


def _new(kind: type[nn.Module]) -> PackedExperts:
    layer_class = packed_class(kind)
    return layer_class.__new__(layer_class)
