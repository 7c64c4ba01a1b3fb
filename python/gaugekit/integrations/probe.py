"""Gives a transformers model our attention, if a small model of its kind computes the same with it.

transformers says of a class whether it attends through an interface, but not whether everything its attention needs
passes there: position biases, block masks or sinks may be added on the way or beside. So a twin of the model, few
layers, narrow, of random weights, runs with its own attention and with ours before the model itself is touched.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from . import attention
from .twin import candidates
from .upstream import unfit

try:
    from transformers import PreTrainedModel
    from transformers.utils import logging
except ImportError as error:
    raise unfit(__name__, error) from error

TOKENS = 12
# Rounding grows to some 1e-5 in a few layers; a mask or a term that is missing changes tenths.
LIMIT = torch.finfo(torch.float32).eps ** 0.5
_verdicts: dict[tuple[type, str, str], str | None] = {}


def adopt(model: nn.Module) -> str | None:
    """Sets our attention on ``model``, a transformers model or a wrapper of one; None, or why it was left as it was."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or not hasattr(model, "set_attn_implementation"):
        return "it is no transformers model, so there is no interface to set"
    attention.register()
    configs: set[int] = set()
    for part in inner.modules():
        if isinstance(part, PreTrainedModel) and id(part.config) not in configs:
            configs.add(id(part.config))
            if reason := _verdict(type(part), part.config, part is inner):
                return reason
    model.set_attn_implementation(attention.NAME)
    return None


def _verdict(kind: type, config: Any, whole: bool) -> str | None:
    own = config._attn_implementation
    if own not in ("sdpa", "eager"):
        own = "sdpa" if kind._supports_sdpa else "eager"
    key = (kind, config.to_json_string(use_diff=False), own, whole)
    if key not in _verdicts:
        _verdicts[key] = _ask(kind, config, own, whole)
    return _verdicts[key]


def _ask(kind: type, config: Any, own: str, whole: bool) -> str | None:
    if whole and not (kind._supports_sdpa or kind._supports_attention_backend):
        return f"{kind.__name__} does not declare an attention interface"
    failure = "it takes no input that can be made up"
    for smaller in candidates(config):
        with _aside():
            try:
                twin = _twin(kind, smaller, own)
                calls = _calls(twin)
                before = [call() for call in calls]
            except Exception as error:  # the size does not fit this family: the next may
                failure = f"{type(error).__name__}: {error}"
                continue
            asked = attention.counted()
            try:
                twin.set_attn_implementation(attention.NAME)
                with asked:
                    after = [call() for call in calls]
            except Exception as error:
                return f"{kind.__name__} does not run with it: {error}"
        if not asked.count:
            failure = ""
            continue
        return None if all(map(_same, before, after)) else f"{kind.__name__} computes something else with it"
    return None
