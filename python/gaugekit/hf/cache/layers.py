"""Layers of transformers' caches that hold one tensor: a layer's inputs, or values that are keys, too.

Rows of padding are left out: the real rows of each sequence stand at the front of it, in order, however the batch was
padded. transformers counts columns, padding included, and so do these where it asks.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from gaugekit.hf.attention.mask import Visible
from gaugekit.hf.upstream import unfit
from gaugekit.nn import LayerCache
from gaugekit.nn.cache import put_rows

try:
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise unfit(__name__, error) from error

# What transformers calls the cache of an output and of an argument: "cache" from 5.24 on, "past_key_values" before.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in {field.name for field in fields(CausalLMOutputWithPast)}
)
UNKNOWN = torch.iinfo(torch.int64).min
BEGIN = "it was begun before the model was fused or unfused; begin another"


class GrowingLayer(LayerCache, CacheLayerMixin):
    """A layer of DynamicCache: the keys, values, lengths and running sum of a LayerCache, in buffers with room.

    ``ends`` int64 [B]: how many columns at the end of each sequence are real; None where none was ever padded.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, **_: Any):
        LayerCache.__init__(self)
        self.device: torch.device | None = None  # where the rows come back to, once they were moved away
        self.ends: Tensor | None = None

    @property
    def is_initialized(self) -> bool:
        return self.keys is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.keys is None else self.keys.shape[0]

    def lazy_initialization(self, *_: Any) -> None:
        """The first append does it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        step = self.append(key_states, value_states)
        return step.keys, step.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        if self.keys is not None:
            self.device = self.keys.device
            self._move("cpu")

    def prefetch(self) -> None:
        if self.keys is not None and self.device not in (None, self.keys.device):
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        self.keys = self.keys.to(device, non_blocking=True)
        self.values = None if self.values is None else self.values.to(device, non_blocking=True)

    def saw(self, real: Tensor | None, count: int) -> None:
        """Notes which of the ``count`` columns that are about to come are real, bool [B, count]; None: all."""
        if real is not None:
            self.ends = _trailing(self.columns if self.ends is None else self.ends, real)
        elif self.ends is not None:
            self.ends = self.ends + count

    def reset(self) -> None:
        LayerCache.__init__(self)
        self.ends = None

    def crop(self, tokens_to_remove: int) -> None:
        columns = _to_crop(tokens_to_remove, self.ends)
        if self.columns and columns:
            LayerCache.crop(self, columns)
            self.ends = None if self.ends is None else self.ends - columns

    def select(self, index: Tensor) -> None:
        super().select(index)
        if self.ends is not None:
            self.ends = self.ends.index_select(0, index.to(self.ends.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.select(rows.repeat_interleave(repeats))


class SingleLayer(GrowingLayer):
    """A layer of DynamicCache that holds one tensor.

    ``update`` takes rows [B, G, T, C], nothing, the mask of the forward and, where angles depend on them, the positions
    [B or 1, T]; it returns the rows so far, [B, G, S, C], and the mask as these rows stand. ``offset`` [B]: what
    positions count from, where they are given.
    """

    def __init__(self, **_: Any):
        super().__init__()
        self.offset: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor | None, mask: Visible | None = None,
        positions: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, Visible]:  # fmt: skip
        if value_states is not None:
            raise ValueError(f"{CACHE}: expected one of keys and values, got one of a fused model: {BEGIN}")
        count, before = key_states.shape[2], self.columns
        new = None
        if mask is not None and mask.key_lengths is not None:
            start = self.lengths
            if start is None:
                start = torch.full_like(mask.key_lengths, before)
            new = mask.key_lengths - start
            _expect((new >= 0) & (new <= count), "the padding of earlier calls, too")
            key_states, positions, real = _pushed(mask, start, new, key_states, positions)
            self.saw(real, count)
        elif self.lengths is not None:
            if not bool((self.lengths == before).all()):
                raise ValueError(
                    "attention_mask: expected one that says which cached rows are padding, got none"
                )
            self.lengths = None
        if positions is not None:
            begin = self.lengths if self.lengths is not None else before
            self.offset = _offset(positions, self.offset, begin, new)
        # values of no width: nothing to store, and there for code of transformers that reads them
        step = self.append(key_states, key_states[..., :0], new, mean=False)
        held = (
            Visible(self.columns, True) if mask is None else replace(mask, keys=self.columns, key_order=None)
        )
        return step.keys, held

    def reset(self) -> None:
        super().reset()
        self.offset = None

    def select(self, index: Tensor) -> None:
        super().select(index)
        if self.offset is not None and len(self.offset) > 1:
            self.offset = self.offset.index_select(0, index.to(self.offset.device))


class StaticSingleLayer(StaticLayer):
    """A layer of StaticCache that holds one tensor; ``update`` as that of ``SingleLayer``.

    ``lengths`` int64 [B] are the real rows of each sequence, ``ends`` int64 [B] its real columns at the end. With more
    than one row, and outside of a traced call, only the columns in use are returned.
    """

    def __init__(self, max_cache_len: int, **_: Any):
        super().__init__(max_cache_len=max_cache_len)
        self.lengths: Tensor | None = None
        self.ends: Tensor | None = None
        self.offset: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        super().lazy_initialization(key_states, key_states[..., :0])  # as in SingleLayer
        self.lengths = torch.zeros(key_states.shape[0], dtype=torch.int64, device=self.device)
        self.ends = torch.zeros_like(self.lengths)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.lengths)
            torch._dynamo.mark_static_address(self.ends)

    def update(
        self, key_states: Tensor, value_states: Tensor | None, mask: Visible | None = None,
        positions: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, Visible]:  # fmt: skip
        if value_states is not None:
            raise ValueError(f"{CACHE}: expected one of keys and values, got one of a fused model: {BEGIN}")
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        count = key_states.shape[2]
        if mask is None or mask.key_lengths is None:  # the prompt fills the cache
            mask = Visible(self.max_cache_len, True, None, self.lengths + count, self.lengths.clone())
        new = mask.key_lengths - self.lengths
        _expect((new >= 0) & (new <= count), "the padding of earlier calls, too")
        key_states, positions, real = _pushed(mask, self.lengths, new, key_states, positions)
        self.ends.copy_(_trailing(self.ends, real))
        if positions is not None:
            self.offset = _offset(positions, self.offset, self.lengths, new)
        row = self.lengths[:, None] + torch.arange(count, device=key_states.device)
        put_rows(self.keys, row, key_states)
        self.lengths.copy_(mask.key_lengths)
        self.cumulative_length.add_(count)
        rows = self.keys
        if count > 1 and not torch.compiler.is_compiling():
            rows = rows[:, :, : int(self.cumulative_length)]
        return rows, replace(mask, keys=rows.shape[2], key_order=None)

    def reset(self) -> None:
        super().reset()
        self.offset = None
        if self.lengths is not None:
            self.lengths.zero_(), self.ends.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        columns = _to_crop(tokens_to_remove, self.ends)
        if self.lengths is not None:
            for count in (self.cumulative_length, self.lengths, self.ends):
                count.sub_(columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for name in ("lengths", "ends", "offset"):
            if (numbers := getattr(self, name)) is not None and len(numbers) > 1:
                setattr(self, name, numbers.index_select(0, beam_idx.to(numbers.device)))


def single_layer(cache: Any, index: int) -> None:
    """Makes layer ``index`` of a transformers cache one that holds one tensor; ValueError where it cannot be."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"{CACHE}: expected a DynamicCache or StaticCache, got {type(cache).__name__}")
    kind = getattr(cache, "layer_class_to_replicate", None)
    while kind is not None and len(layers) <= index:
        layers.append(kind())
    layer = layers[index]
    if isinstance(layer, (SingleLayer, StaticSingleLayer)):
        return
    if type(layer) not in (DynamicLayer, StaticLayer):
        raise ValueError(
            f"{CACHE}: expected dynamic or static layers where one tensor is cached, got {type(layer).__name__}"
        )
    if layer.is_initialized and int(layer.get_seq_length()):
        raise ValueError(f"{CACHE}: expected one of a fused model, got one of keys and values: {BEGIN}")
    layers[index] = SingleLayer() if type(layer) is DynamicLayer else StaticSingleLayer(layer.max_cache_len)


def _pushed(
    mask: Visible, start: Tensor, new: Tensor, rows: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``rows`` [B, G, T, C] and ``positions`` [B or 1, T], of each sequence the ``new`` [B] real ones first; and which
    columns are real, bool [B, T]. ``start`` [B] rows stand before.
    """
    count = rows.shape[2]
    if count == 1:
        return rows, positions, new[:, None] > 0
    order = mask.query_order
    if order is None:  # padding at one end at most, which then stands at the other
        order = (torch.arange(count, device=start.device) + (start - mask.query_start)[:, None]) % count
    order = order.to(rows.device)
    if positions is not None:
        positions = positions.expand(rows.shape[0], -1).gather(1, order)
    front = torch.arange(count, device=rows.device) < new[:, None]
    real = torch.zeros_like(front).scatter(1, order, front)
    return rows.gather(2, order[:, None, :, None].expand_as(rows)), positions, real


def _trailing(before: Tensor | int, real: Tensor) -> Tensor:
    """How many columns at the end of each sequence are real, int64 [B]: ``before`` [B] of earlier calls, then real
    [B, T].
    """
    run = real.long().flip(1).cumprod(1).sum(1)
    return torch.where(run == real.shape[1], before + run, run)


def _to_crop(tokens_to_remove: int, ends: Tensor | None) -> int:
    """How many columns to take back, each a real row of every sequence; ValueError where they are not."""
    if tokens_to_remove > 0:
        raise ValueError(f"tokens_to_remove: expected a negative number or 0, got {tokens_to_remove}")
    if ends is not None and bool((ends < -tokens_to_remove).any()):
        raise ValueError(
            f"tokens_to_remove: expected at most {int(ends.min())} columns, as many as stand behind the last padding "
            f"of every sequence, got {-tokens_to_remove}"
        )
    return -tokens_to_remove


def _offset(positions: Tensor, offset: Tensor | None, before: Tensor | int, new: Tensor | None) -> Tensor:
    """What ``positions`` [B or 1, T] count from, int64 [B or 1], ``UNKNOWN`` where no row is real yet.

    ValueError unless they count on from ``before`` [B], one after the other.

    Angles are taken by the row: that is the same as by the position as long as both count alike.
    """
    row = torch.arange(positions.shape[1], device=positions.device)
    real = (row >= 0)[None] if new is None else row < new[:, None]
    counted = positions - row - (before[:, None] if isinstance(before, Tensor) else before)
    first = torch.where(real[:, 0], counted[:, 0], UNKNOWN)
    offset = first if offset is None else torch.where(offset == UNKNOWN, first, offset)
    _expect(
        (counted == offset[:, None]) | ~real, "positions that go on where those before ended", "position_ids"
    )
    return offset


def _expect(condition: Tensor, what: str, name: str = "attention_mask") -> None:
    """ValueError unless ``condition`` holds throughout; where looking at it would cost, an error of the device."""
    message = f"{name}: expected one that fits the cached rows: {what}"
    if condition.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(condition.all(), message)
    elif not bool(condition.all()):
        raise ValueError(message)
