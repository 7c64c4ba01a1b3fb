"""Runs a transformers model's attention on ``gaugekit.shaped_attention``: attn_implementation="gaugekit".

transformers asks two registries about an implementation: one for the function that attends and one for the function
that makes its mask. A name that stands in the first only gets no mask at all, and causality is lost in silence; so
``register`` always enters both. Our mask is a ``Visible``: a few numbers a sequence, never a [T, S] array.

Covered: encoders and decoders, key/value groups, padding on either side or anywhere, caches (growing, sliding and
static), prefill in chunks, beams, sliding windows, one row of packed sequences. Refused with a ValueError, never
computed wrongly: masks of any other shape, attention dropout, logit soft-caps, attention sinks, position biases,
paged caches, and returned attention weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from gaugekit.integrations.neutreno import SharedValues
from gaugekit.nn.tap import Tap
from gaugekit.ops.shaped_attention import shaped_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import masking_utils as masking
except ImportError as error:
    raise ImportError(
        "gaugekit.integrations.attention needs transformers: pip install gaugekit[hf]"
    ) from error

NAME = "gaugekit"
TAP = "gaugekit_tap"
# Arguments that change the scores or the probabilities; other keyword arguments only inform.
UNCOVERED = ("softcap", "s_aux", "position_bias", "head_mask", "cache", "output_attentions")
INSTEAD = "load the model with attn_implementation='sdpa' or 'eager'"


def register() -> None:
    """Enters "gaugekit" in transformers' attention and mask registries; doing it again changes nothing.

    Afterwards ``from_pretrained(..., attn_implementation="gaugekit")`` and
    ``model.set_attn_implementation("gaugekit")`` work.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, visible)


@dataclass(frozen=True)
class Visible:
    """Which keys each query sees, as ``gaugekit.shaped_attention`` takes it, made once a forward.

    ``keys`` is S. ``key_order`` [B, S] lists each sequence's real keys first, in order, ``query_order`` [B, T] its
    real queries; None where they stand so already. Lengths and starts count real tokens only.
    """

    keys: int
    causal: bool
    window: int | None = None
    key_lengths: torch.Tensor | None = None
    query_start: torch.Tensor | None = None
    key_order: torch.Tensor | None = None
    query_order: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    # generate() makes the mask beforehand for a static cache and hands it back; these tell it from a 2D mask there.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, 1, 1, self.keys)

    def contiguous(self) -> Visible:
        return self


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
    if dropout:
        raise ValueError(
            f"dropout: expected 0, got {dropout}; shaped attention has no dropout on its probabilities. Set the "
            f"config's attention dropout to 0, call model.eval(), or {INSTEAD}"
        )
    for name in UNCOVERED:
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(f"{name}: shaped attention does not cover it; {INSTEAD}")
    mask = attention_mask
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = Visible(key.shape[2], bool(causal))
        if sliding_window is not None and key.shape[2] > sliding_window:
            raise ValueError(
                f"attention_mask: expected one that holds the sliding window, got none; {INSTEAD}"
            )
    elif not isinstance(mask, Visible):
        raise ValueError(
            f"attention_mask: expected a 2D mask of real tokens, got one of shape {list(mask.shape)}; {INSTEAD}"
        )
    elif mask.keys != key.shape[2]:
        raise ValueError(
            f"attention_mask: made for {mask.keys} keys, but there are {key.shape[2]}; {INSTEAD}"
        )

    tap = getattr(module, TAP, None) if query.shape[2] == key.shape[2] else None
    row_by_row = gaugekit_values is not None or (tap is not None and tap._forward_hooks)
    if row_by_row and not mask.causal and mask.query_start is None and mask.query_order is None:
        mask = replace(mask, query_order=mask.key_order)  # each query then stands at the row of its own key
    there = query.device
    if mask.key_order is not None:
        order = mask.key_order.to(there)
        key, value = _gather(key, order), _gather(value, order)
    if mask.query_order is not None:
        query_order = mask.query_order.to(there)
        query = _gather(query, query_order)
    terms = {}
    if gaugekit_values is not None:
        own = _own(value, mask, query.shape[2])
        if mask.query_order is not None:
            own = _gather(own, query_order.argsort(1))
        terms = gaugekit_values.of(module, value, own, query.shape[1])
        if terms and mask.query_order is not None:
            terms["v0"] = _gather(terms["v0"], query_order)
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
        out = _gather(out, query_order.argsort(1))
    return out.transpose(1, 2).contiguous(), None


def visible(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | Visible | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visible | None:
    """transformers' mask function: None when nothing is padded and nothing windowed, else a :class:`Visible`.

    Queries stand at columns q_offset … q_offset + T − 1, keys at kv_offset … kv_offset + S − 1 of the 2D
    ``attention_mask`` [B, ≥ S], true at real tokens. Raises ValueError for a ``mask_function`` that is neither causal
    nor bidirectional nor either with a sliding window nor packed sequences in one row.
    """
    if isinstance(attention_mask, Visible):
        return attention_mask
    causal, window, packed = _pattern(mask_function)
    if packed is not None:
        if batch_size != 1:
            # A compiled model always arrives here without a mask: its position ids cannot be looked at.
            raise ValueError(
                f"position_ids: expected one row of packed sequences, got {batch_size} rows; if none is packed, pass "
                f"attention_mask=torch.ones_like(input_ids), else {INSTEAD}"
            )
        starts = torch.nonzero(torch.diff(packed[0], prepend=packed[0, :1] - 1)).flatten()
        ends = torch.tensor([q_length], device=starts.device)
        return Visible(kv_length, causal, window, cu_seqlens=torch.cat([starts, ends]).int())
    start = q_offset - kv_offset  # the column of the first query, counted from the first key
    if window is not None and isinstance(start, int) and window >= max(start + q_length, kv_length):
        window = None  # every pair of tokens is within it
    real = _real(attention_mask, kv_length, kv_offset)
    tracing = torch.compiler.is_compiling()
    plain = causal and isinstance(start, int) and start + q_length == kv_length
    if real is None or (not tracing and bool(real.all())):
        if window is None and (plain or not causal):
            return None
        starts = _numbers(start, batch_size, device)
        # A static cache has room for more keys than there are; those hold zeros and no query may see them.
        lengths = (starts + q_length).clamp(max=kv_length) if causal else None
        return Visible(kv_length, causal, window, lengths, starts)

    lengths = real.sum(1)
    rising = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]  # runs of real tokens in each sequence
    if window is not None and (tracing or bool((rising > 1).any())):
        raise ValueError(
            f"attention_mask: expected padding at one end only under a sliding window; {INSTEAD}"
        )
    key_order = (
        _order(real) if tracing or bool((rising > 1).any()) or not bool(real[lengths > 0, 0].all()) else None
    )
    if not causal:
        starts = None if window is None else -real.int().argmax(1)
        return Visible(kv_length, causal, window, lengths, starts, key_order)

    columns = _numbers(start, batch_size, device)[:, None] + torch.arange(q_length, device=device)
    counted = torch.nn.functional.pad(real.cumsum(1), (1, 0))
    before = counted.gather(1, columns[:, :1])[:, 0]  # real keys before the first query
    asked = real.gather(1, columns)
    runs = (asked[:, 1:] & ~asked[:, :-1]).sum(1) + asked[:, 0]
    if tracing or bool((runs > 1).any()):
        return Visible(kv_length, causal, window, lengths, before, key_order, _order(asked))
    return Visible(kv_length, causal, window, lengths, before - asked.int().argmax(1), key_order)


def _pattern(mask_function: Callable | None) -> tuple[bool, int | None, torch.Tensor | None]:
    """(causal, window, packed sequence numbers) of one of transformers' mask functions, read from its parts."""
    if mask_function is None or mask_function is masking.causal_mask_function:
        return True, None, None
    if mask_function is masking.bidirectional_mask_function:
        return False, None, None
    bound = inspect.getclosurevars(mask_function).nonlocals
    made_by = getattr(mask_function, "__qualname__", "").split(".")[0]
    parts = bound.get("mask_functions", ())
    if made_by == "and_masks" and len(parts) == 2:
        kind = getattr(parts[0], "__qualname__", "").split(".")[0]
        inner = inspect.getclosurevars(parts[0]).nonlocals
        if kind == "sliding_window_overlay" and parts[1] is masking.causal_mask_function:
            return True, inner["sliding_window"], None
        if kind == "sliding_window_bidirectional_overlay" and parts[1] is masking.bidirectional_mask_function:
            return False, inner["sliding_window"] + 1, None  # theirs counts the distance, ours the keys
        if kind == "packed_sequence_mask_function":
            remapped = inspect.getclosurevars(parts[1]).nonlocals.get("mask_function")
            causal, window, deeper = _pattern(remapped)
            if deeper is None:
                return causal, window, inner["packed_sequence_mask"]
    raise ValueError(
        "attention_mask: expected a causal, bidirectional, sliding-window or packed mask, got the custom pattern "
        f"{getattr(mask_function, '__qualname__', mask_function)}; {INSTEAD}"
    )


def _real(attention_mask: torch.Tensor | None, keys: int, offset: int) -> torch.Tensor | None:
    """The columns of the 2D mask that belong to the keys, Boolean [B, S]; columns it does not reach are no tokens."""
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    missing = offset + keys - mask.shape[1]
    return torch.nn.functional.pad(mask, (0, max(missing, 0)))[:, offset : offset + keys]


def _order(real: torch.Tensor) -> torch.Tensor:
    """[B, N] positions, those of real tokens first; stable, so both kinds keep their order."""
    return (~real).to(torch.uint8).argsort(dim=1, stable=True)


def _numbers(value: int | torch.Tensor, batch_size: int, device: torch.device | str) -> torch.Tensor:
    """``value`` as int64 [B]."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.int64).reshape(-1).expand(batch_size)
    return torch.full((batch_size,), value, dtype=torch.int64, device=device)


def _own(value: torch.Tensor, mask: Visible, queries: int) -> torch.Tensor:
    """The rows of ``value`` [B, G, S, V] that stand at the queries' positions: [B, G, T, V]."""
    keys = value.shape[2]
    if mask.query_start is None:
        return value[:, :, keys - queries :] if mask.causal else value
    position = mask.query_start.to(value.device)[:, None] + torch.arange(queries, device=value.device)
    return _gather(value, position.clamp(0, keys - 1))


def _show(tap: torch.nn.Module, query, key, value, mask: Visible, scaling: float | None) -> None:
    """Calls the tap with queries at the rows of their keys."""
    if mask.cu_seqlens is not None and tap._forward_hooks:
        raise ValueError("cu_seqlens: the energy of packed sequences is not covered")
    lengths = None if mask.key_lengths is None else mask.key_lengths.to(query.device)
    if mask.query_start is not None:
        row = torch.arange(key.shape[2], device=query.device) - mask.query_start.to(query.device)[:, None]
        query = _gather(query, row.clamp(0, query.shape[2] - 1))
    tap(value, query, key, causal=mask.causal, window=mask.window, key_lengths=lengths, scale=scaling)


def add_taps(model: torch.nn.Module) -> list[str]:
    """Gives every attention of a transformers model a ``Tap`` as a child; the paths of those that got one."""
    found = [name for name, module in model.named_modules() if hasattr(module, "is_causal")]
    added = [name for name in found if not hasattr(model.get_submodule(name), TAP)]
    for name in added:
        model.get_submodule(name).add_module(TAP, Tap())
    return [f"{name}.{TAP}" for name in added]


def remove_taps(model: torch.nn.Module, paths: list[str]) -> None:
    for path in paths:
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)


def _gather(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [B, heads, N, width] with its N positions in ``order`` [B, N]."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
