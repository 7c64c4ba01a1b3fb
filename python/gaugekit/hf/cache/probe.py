"""Whether a small model of a kind decodes the same from one cached tensor, asked before the model itself is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.hf.attention import interface, twin
from gaugekit.hf.attention.probe import line, quiet, same
from gaugekit.hf.cache.layers import CACHE
from gaugekit.hf.upstream import unfit

try:
    from transformers import DynamicCache, EncoderDecoderCache
except ImportError as error:
    raise unfit(__name__, error) from error

SPLIT = (7, 3, 1, 1)  # a prompt, a chunk, and steps
PADDING = 5
_verdicts: dict[tuple, str | None] = {}


def verdict(kind: type, config: Any, cache: str, swap: Callable[[nn.Module], None]) -> str | None:
    """Why models of this class and config may not cache one tensor, None where they may; asked once a process.

    ``swap`` makes a model do so, whatever comes of it; ``cache`` is what its tensor holds.
    """
    key = (kind, twin.plain(config).to_json_string(use_diff=False), cache)
    if key not in _verdicts:
        with quiet():
            _verdicts[key] = _ask(kind, config, swap)
    return _verdicts[key]


def _ask(kind: type, config: Any, swap: Callable[[nn.Module], None]) -> str | None:
    interface.register()
    reason = None
    for size in twin.smaller(config):
        with twin.aside():
            try:
                model = twin.make(kind, size, interface.NAME)
                inputs = twin.inputs(model)
                ids = inputs.get("input_ids", torch.arange(3, 3 + 2 * sum(SPLIT)).view(2, -1))
                before = _decoded(model, inputs, ids)
            except Exception as error:  # these sizes do not fit this family: the next may
                reason = reason or f"{kind.__name__} cannot be tried on a small scale: {line(error)}"
                continue
            try:
                swap(model)
                after = _decoded(model, inputs, ids)
            except Exception as error:
                return f"a small {kind.__name__} does not run so: {line(error)}"
            return None if same(before, after) else f"a small {kind.__name__} does not compute the same so"
    return reason


def _decoded(model: nn.Module, inputs: dict[str, Tensor], ids: Tensor) -> list[Tensor]:
    """What the model answers at the real tokens of ``ids`` [2, columns], left-padded, a few columns at a time."""
    whole = model.config.is_encoder_decoder
    names = ("decoder_input_ids", "decoder_attention_mask") if whole else ("input_ids", "attention_mask")
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    cache: Any = DynamicCache(config=model.config)
    cache = EncoderDecoderCache(cache, DynamicCache(config=model.config)) if whole else cache
    others = inputs if whole else {}
    answers, begin = [], 0
    for columns in SPLIT:
        end = begin + columns
        given = {names[0]: ids[:, begin:end], names[1]: mask[:, :end], CACHE: cache, "use_cache": True}
        out = model(**(others | given)).to_tuple()
        answer = next(x for x in out if isinstance(x, Tensor) and x.is_floating_point())
        answers.append(answer[mask[:, begin:end].bool()])
        begin = end
    return answers
