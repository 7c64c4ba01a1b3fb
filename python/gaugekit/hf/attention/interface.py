"""Runs a transformers model's attention on ``gaugekit.shaped_attention``: attn_implementation="gaugekit".

transformers asks two registries about an implementation: one for the function that attends and one for the function
that makes its mask. A name that stands in the first only gets no mask at all, and causality is lost in silence; so
``register`` always enters both. Our mask is a ``Visible``: a few numbers a sequence, never a [T, S] array.

Covered: encoders and decoders, key/value groups, padding on either side or anywhere, caches (growing, sliding and
static), prefill in chunks, beams, sliding windows, rows of packed sequences, torch.compile and torch.export of these.
Refused with a ValueError, never computed wrongly: masks of any other shape or read by the model, attention dropout,
returned attention weights, and every argument not known to be mere information: logit soft-caps, sinks, position
biases, indices of sparse attention. The paged cache of continuous batching is paged.py's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gaugekit.hf.attention import paged
from gaugekit.hf.attention.mask import INSTEAD, Visible, visible
from gaugekit.hf.attention.neutreno import SharedValues
from gaugekit.hf.upstream import unfit
from gaugekit.nn.tap import Tap
from gaugekit.ops.shaped_attention.operator import shaped_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise unfit(__name__, error) from error

NAME = "gaugekit"
TAP = "gaugekit_tap"
# Keyword arguments that only inform: whatever else is given may change the scores or the probabilities, and is refused.
INFORMATIVE = {
    "cache_position", "deterministic", "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "return_shared_kv_states", "tokenizer", "use_cache",
}  # fmt: skip
PACKED = {"cu_seq_lens_q", "cu_seq_lens_k"}  # say again what a mask of packed rows says
FLAGS = {"output_attentions"}  # those that ask for nothing where they are False


def register() -> None:
    """Enters "gaugekit" in transformers' attention and mask registries, and lets continuous batching use it.

    Afterwards ``from_pretrained(..., attn_implementation="gaugekit")`` and
    ``model.set_attn_implementation("gaugekit")`` work. Doing it again changes nothing.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, visible)
    paged.register(NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Visible | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    gaugekit_values: SharedValues | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling · Q Kᵀ) V for query [B, H, T, K], key [B, G, S, K], value [B, G, S, V] -> ([B, T, H, V], None).

    ``attention_mask`` is what :func:`visible` made; None means that nothing is padded, and then the module (or
    ``is_causal``) says whether it is causal, as with transformers' own sdpa. Padding rows may hold zeros. With
    ``gaugekit_values`` (neutreno.py) λ (V⁰ − V) is added above the first layer. A ``Tap`` the module has sees what is
    attended to, whole sequences only. Raises ValueError for what shaped attention does not cover.
    """
    packed = isinstance(attention_mask, Visible) and attention_mask.cu_seqlens is not None
    in_pages = "write_index" in kwargs
    check({**kwargs, "dropout": dropout}, attention_mask)
    if in_pages:
        return paged.attend(module, query, key, value, kwargs, scaling, sliding_window, gaugekit_values), None
    mask = _mask(module, query, key, attention_mask, is_causal, sliding_window)
    if packed:
        batch = query.shape[0]
        query, key, value = (_one_row(x) for x in (query, key, value))
    tap = module._modules.get(TAP) if query.shape[2] == key.shape[2] else None
    row_by_row = gaugekit_values is not None or (tap is not None and tap._forward_hooks)
    if row_by_row and not mask.causal and mask.query_start is None and mask.query_order is None:
        mask = replace(mask, query_order=mask.key_order)  # each query then stands at the row of its own key
    there = query.device
    if mask.key_order is not None:
        order = mask.key_order.to(there)
        key, value = gather(key, order), gather(value, order)
    if mask.query_order is not None:
        query_order = mask.query_order.to(there)
        query = gather(query, query_order)
    terms = {}
    if gaugekit_values is not None:
        own = _own(value, mask, query.shape[2])
        if mask.query_order is not None:
            own = gather(own, query_order.argsort(1))
        terms = gaugekit_values.of(module, value, own, query.shape[1])
        if terms and mask.query_order is not None:
            terms["v0"] = gather(terms["v0"], query_order)
    if tap is not None:
        _show(tap, query, key, value, mask, scaling)
    out = shaped_attention(
        query,
        key,
        value,
        causal=mask.causal,
        window=mask.window,
        query_start=None if mask.query_start is None else mask.query_start.to(there),
        key_lengths=None if mask.key_lengths is None else mask.key_lengths.to(there),
        cu_seqlens=None if mask.cu_seqlens is None else mask.cu_seqlens.to(there),
        scale=scaling,
        **terms,
    )
    if mask.query_order is not None:
        out = gather(out, query_order.argsort(1))
    out = out.transpose(1, 2)
    return (out.unflatten(1, (batch, -1))[0] if packed else out).contiguous(), None


def check(said: dict[str, Any], mask: Visible | None) -> None:
    """ValueError where ``said``, what an attention function is given beside tensors and scale, asks for what shaped
    attention does not cover.
    """
    if dropout := said.get("dropout"):
        raise ValueError(
            f"dropout: expected 0, got {dropout}; shaped attention has no dropout on its probabilities. Set the "
            f"config's attention dropout to 0, call model.eval(), or {INSTEAD}"
        )
    packed = isinstance(mask, Visible) and mask.cu_seqlens is not None
    known = INFORMATIVE | {"dropout"} | (PACKED if packed else set())
    known |= paged.ARGUMENTS if "write_index" in said else set()
    for name, given in said.items():
        if given is not None and name not in known and not (given is False and name in FLAGS):
            raise ValueError(f"{name}: shaped attention does not cover it; {INSTEAD}")


def _mask(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    given: Visible | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> Visible:
    """The mask that was given, checked; without one, what the module says of a call in which nothing is padded."""
    keys = key.shape[2]
    if isinstance(given, Visible):
        if given.keys != keys:
            raise ValueError(f"attention_mask: made for {given.keys} keys, but there are {keys}; {INSTEAD}")
        return given
    if given is not None:
        raise ValueError(
            f"attention_mask: expected a 2D mask of real tokens, got one of shape {list(given.shape)}; {INSTEAD}"
        )
    if sliding_window is not None and keys > sliding_window:
        raise ValueError(f"attention_mask: expected one that holds the sliding window, got none; {INSTEAD}")
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    if causal and query.shape[2] != 1 and query.shape[2] != keys:
        raise ValueError(
            f"attention_mask: expected one that says where {query.shape[2]} causal queries stand among {keys} keys, "
            f"got none; {INSTEAD}"
        )
    return Visible(keys, causal)


def _one_row(x: torch.Tensor) -> torch.Tensor:
    """The B rows of x [B, heads, T, width] one after the other: [1, heads, B·T, width]."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _own(value: torch.Tensor, mask: Visible, queries: int) -> torch.Tensor:
    """The rows of ``value`` [B, G, S, V] that stand at the queries' positions: [B, G, T, V]."""
    keys = value.shape[2]
    if mask.query_start is None:
        return value[:, :, keys - queries :] if mask.causal else value
    position = mask.query_start.to(value.device)[:, None] + torch.arange(queries, device=value.device)
    return gather(value, position.clamp(0, keys - 1))


def _show(tap: torch.nn.Module, query, key, value, mask: Visible, scaling: float | None) -> None:
    """Calls the tap with queries at the rows of their keys."""
    if mask.cu_seqlens is not None and tap._forward_hooks:
        raise ValueError("cu_seqlens: the energy of packed sequences is not covered")
    lengths = None if mask.key_lengths is None else mask.key_lengths.to(query.device)
    if mask.query_start is not None:
        row = torch.arange(key.shape[2], device=query.device) - mask.query_start.to(query.device)[:, None]
        query = gather(query, row.clamp(0, query.shape[2] - 1))
    tap(value, query, key, causal=mask.causal, window=mask.window, key_lengths=lengths, scale=scaling)


def add_taps(model: torch.nn.Module) -> list[str]:
    """Gives every attention of a transformers model a ``Tap`` as a child; the paths of those that got one."""
    attentions = [name for name, module in model.named_modules() if hasattr(module, "is_causal")]
    added = [name for name in attentions if not hasattr(model.get_submodule(name), TAP)]
    for name in added:
        model.get_submodule(name).add_module(TAP, Tap())
    return [f"{name}.{TAP}" for name in added]


def remove_taps(model: torch.nn.Module, paths: list[str]) -> None:
    for path in paths:
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)


def gather(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [B, heads, N, width] with its N positions in ``order`` [B, N]."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
