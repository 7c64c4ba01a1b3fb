"""transformers' masks as ``gaugekit.shaped_attention`` takes them: a few numbers a sequence, never a [T, S] array.

``visible`` is registered as the mask function of "gaugekit". transformers describes a mask by a function of index
tensors, made of closures; ``_pattern`` reads their parts. While torch.compile or torch.export traces there are no
closures to read, so ``_traced_pattern`` takes the kind from the other arguments and asks the function itself, along a
few diagonals, whether it agrees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaugekit.hf.upstream import unfit

try:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
except ImportError as error:
    raise unfit(__name__, error) from error

INSTEAD = "load the model with attn_implementation='sdpa' or 'eager'"
# What transformers tells a mask function besides: read here, or of no matter to a mask without an array.
OPTIONS = {
    "allow_is_causal_skip", "allow_is_bidirectional_skip", "local_size", "use_vmap", "dtype", "config",
}  # fmt: skip


class Read(ValueError, AttributeError):
    """A model reads or changes its mask, which has no entries: raised where it tries to (hasattr still says no)."""

    def __init__(self, name: str = "its entries"):
        super().__init__(
            f"attention_mask: expected to be handed to the attention only, but the model reads {name}; {INSTEAD}"
        )


@dataclass(frozen=True)
class Visible:
    """Which keys each query sees, as ``gaugekit.shaped_attention`` takes it, made once a forward.

    ``keys`` is S. ``key_order`` [B, S] lists each sequence's real keys first, in order, ``query_order`` [B, T] its
    real queries; None where they stand so already. Lengths and starts count real tokens only. ``cu_seqlens`` bounds
    the sequences packed in the rows, the rows laid one after the other: [0, …, B·T].
    """

    keys: int
    causal: bool
    window: int | None = None
    key_lengths: Tensor | None = None
    query_start: Tensor | None = None
    key_order: Tensor | None = None
    query_order: Tensor | None = None
    cu_seqlens: Tensor | None = None

    # generate() makes the mask beforehand for a static cache and hands it back; these tell it from a 2D mask there.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, 1, 1, self.keys)

    def contiguous(self) -> Visible:
        return self

    def __getitem__(self, index: Any) -> None:
        raise Read()

    def __getattr__(self, name: str) -> None:
        raise Read(name)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None) -> None:
        raise Read()


class Pattern(NamedTuple):
    """What a mask function says, padding apart; ``starts`` [B, T] is true at the first token of a packed sequence."""

    causal: bool
    window: int | None = None
    starts: Tensor | None = None


def visible(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | Visible | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Visible | None:
    """transformers' mask function: None when nothing is padded and nothing windowed, else a :class:`Visible`.

    Queries stand at columns q_offset … q_offset + T − 1, keys at kv_offset … kv_offset + S − 1 of the 2D
    ``attention_mask`` [B, ≥ S], true at real tokens. Raises ValueError for a ``mask_function`` that is neither causal
    nor bidirectional nor either with a sliding window nor packed sequences in a row, and for an option it does not
    know. Where values cannot be looked at (a traced call), a mask that turns out not to fit is a RuntimeError of the
    traced program.
    """
    if isinstance(attention_mask, Visible):
        return attention_mask
    if unknown := sorted(
        name for name, value in options.items() if name not in OPTIONS and value is not None
    ):
        raise ValueError(f"{', '.join(unknown)}: a mask without an array does not cover it; {INSTEAD}")
    tracing = torch.compiler.is_compiling()
    if tracing:
        here = (batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask is None, device)
        causal, window, starts = _traced_pattern(mask_function, options, *here)
    else:
        causal, window, starts = _pattern(mask_function)
    if starts is not None:
        return Visible(kv_length, causal, window, cu_seqlens=_bounds(starts, tracing))
    start = q_offset - kv_offset  # the column of the first query, counted from the first key
    counted_start = not isinstance(start, Tensor)
    if window is not None and counted_start and not tracing and window >= max(start + q_length, kv_length):
        window = None  # every pair of tokens is within it
    real = _real(attention_mask, kv_length, kv_offset)
    plain = causal and counted_start and start + q_length == kv_length
    if real is None or (not tracing and bool(real.all())):
        if (
            window is None
            and plain
            and (q_length != kv_length or not options.get("allow_is_causal_skip", True))
        ):
            return Visible(kv_length, causal)
        if window is None and (plain or not causal):
            return None
        starts = _numbers(start, batch_size, device)
        # A static cache has room for more keys than there are; those hold zeros and no query may see them.
        lengths = (starts + q_length).clamp(max=kv_length) if causal else None
        return Visible(kv_length, causal, window, lengths, starts)
    return _padded(Visible(kv_length, causal, window), real, start, q_length, tracing)


def _padded(seen: Visible, real: Tensor, start: int | Tensor, queries: int, tracing: bool) -> Visible:
    """``seen`` with the numbers that leave out the columns that are not ``real`` [B, S]."""
    keys, causal, window = seen.keys, seen.causal, seen.window
    lengths = real.sum(1)
    runs = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]  # runs of real tokens in each sequence
    if window is not None:
        message = f"attention_mask: expected padding at one end only under a sliding window; {INSTEAD}"
        if tracing:
            torch._assert_async((runs <= 1).all(), message)
        elif bool((runs > 1).any()):
            raise ValueError(message)
    in_order = not tracing and bool((runs <= 1).all()) and bool(real[lengths > 0, 0].all())
    key_order = None if in_order else _order(real)
    if not causal:
        starts = None if window is None else -real.int().argmax(1)
        return Visible(keys, causal, window, lengths, starts, key_order)

    columns = _numbers(start, real.shape[0], real.device)[:, None] + torch.arange(queries, device=real.device)
    counted = torch.nn.functional.pad(real.cumsum(1), (1, 0))
    before = counted.gather(1, columns[:, :1])[:, 0]  # real keys before the first query
    asked = real.gather(1, columns)
    runs = (asked[:, 1:] & ~asked[:, :-1]).sum(1) + asked[:, 0]
    if tracing or bool((runs > 1).any()):
        return Visible(keys, causal, window, lengths, before, key_order, _order(asked))
    return Visible(keys, causal, window, lengths, before - asked.int().argmax(1), key_order)


def _pattern(mask_function: Callable | None) -> Pattern:
    """The pattern of one of transformers' mask functions, read from its parts."""
    if mask_function is None or mask_function is causal_mask_function:
        return Pattern(True)
    if mask_function is bidirectional_mask_function:
        return Pattern(False)
    parts = {_maker(part): part for part in _held(mask_function).get("mask_functions", ())}
    if _maker(mask_function) == "and_masks" and len(parts) == 2:
        if "sliding_window_overlay" in parts and causal_mask_function in parts.values():
            return Pattern(True, _held(parts["sliding_window_overlay"])["sliding_window"])
        if "sliding_window_bidirectional_overlay" in parts and bidirectional_mask_function in parts.values():
            # theirs counts the distance, ours the keys
            return Pattern(False, _held(parts["sliding_window_bidirectional_overlay"])["sliding_window"] + 1)
        if parts.keys() == {"packed_sequence_mask_function", "remap_positions_for_packed_sequence"}:
            inner = _pattern(_held(parts["remap_positions_for_packed_sequence"])["mask_function"])
            numbers = _held(parts["packed_sequence_mask_function"])["packed_sequence_mask"]
            if inner.causal and inner.starts is None:
                starts = torch.diff(numbers, prepend=numbers[:, :1] - 1) != 0
                return Pattern(True, inner.window, starts)
    raise _custom(mask_function)


def _maker(function: Callable) -> str:
    """The name of the function that made this closure, or its own."""
    return getattr(function, "__qualname__", "").split(".")[0]


def _held(function: Callable) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)


def _custom(mask_function: Callable) -> ValueError:
    return ValueError(
        "attention_mask: expected a causal, bidirectional, sliding-window or packed mask, got the custom pattern "
        f"{getattr(mask_function, '__qualname__', mask_function)}; {INSTEAD}"
    )


def _traced_pattern(
    mask_function: Callable | None,
    options: dict[str, Any],
    batch_size: int,
    queries: int,
    keys: int,
    q_offset: int | Tensor,
    kv_offset: int,
    unmasked: bool,
    device: torch.device | str,
) -> Pattern:
    """The pattern while tracing: what the options say, and what the mask function answers there, checked at run time.

    transformers lets only masks with something packed or laid over them not be skipped, and packs only where there is
    neither a mask nor a cache. A query that does not see the token before it then begins a sequence.
    """
    if mask_function is None or mask_function is causal_mask_function:
        return Pattern(True)
    if mask_function is bidirectional_mask_function:
        return Pattern(False)
    if options.get("use_vmap") or not mask_function.__qualname__.startswith("and_masks."):
        raise _custom(mask_function)
    causal, window = "allow_is_bidirectional_skip" not in options, options.get("local_size")
    if not causal:
        window += 1  # theirs counts the distance, ours the keys
    sequence = torch.arange(batch_size, device=device)[:, None]
    column = torch.arange(queries, device=device)[None] + q_offset

    def answers(step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each query sees the key ``step`` columns on; that key's column; and whether there is one."""
        other = column + step
        there = (other >= kv_offset) & (other < kv_offset + keys)
        other = other.clamp(kv_offset, kv_offset + keys - 1)
        return mask_function(sequence, 0, column, other), other, there

    starts = numbers = None
    if causal and unmasked and not options.get("allow_is_causal_skip", True) and queries == keys:
        seen, _, there = answers(-1)
        starts = ~(seen & there).expand(batch_size, -1)
        numbers = starts.cumsum(1)
    agrees = torch.ones((), dtype=torch.bool, device=device)
    for step in (-1, 0, 1) if window is None else (-window, 1 - window, 0, 1, window - 1, window):
        seen, other, there = answers(step)
        expected = (step <= 0 or not causal) and (window is None or -window < step < window)
        if numbers is not None and expected:
            expected = numbers == numbers.gather(1, other.expand(batch_size, -1))
        agrees = agrees & ((seen == expected) | ~there).all()
    torch._assert_async(
        agrees, f"attention_mask: expected a causal, sliding-window or packed mask; {INSTEAD}"
    )
    return Pattern(causal, window, starts)


def _bounds(starts: Tensor, tracing: bool) -> Tensor:
    """int32 ``cu_seqlens`` of the rows of ``starts`` [B, T] laid one after the other; traced, some may be empty."""
    starts = torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], 1).flatten()
    end = starts.new_full((1,), starts.shape[0], dtype=torch.int64)
    if not tracing:
        return torch.cat([torch.nonzero(starts).flatten(), end]).int()
    place = torch.arange(starts.shape[0], device=starts.device)
    return torch.cat([torch.where(starts, place, starts.shape[0]).sort().values, end]).int()


def _real(attention_mask: Tensor | None, keys: int, offset: int) -> Tensor | None:
    """The columns of the 2D mask that belong to the keys, Boolean [B, S]; columns it does not reach are no tokens."""
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    missing = offset + keys - mask.shape[1]
    return torch.nn.functional.pad(mask, (0, max(missing, 0)))[:, offset : offset + keys]


def _order(real: Tensor) -> Tensor:
    """[B, N] positions, those of real tokens first; stable, so both kinds keep their order."""
    return (~real).to(torch.uint8).argsort(dim=1, stable=True)


def _numbers(value: int | Tensor, batch_size: int, device: torch.device | str) -> Tensor:
    """``value`` as int64 [B]."""
    if isinstance(value, Tensor):
        return value.to(device, torch.int64).reshape(-1).expand(batch_size)
    return torch.full((batch_size,), value, dtype=torch.int64, device=device)
