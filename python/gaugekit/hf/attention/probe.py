"""Gives a transformers model our attention, if a small model of its kind computes the same with it.

transformers says of a class whether it attends through an interface, but not whether everything its attention needs
passes there: position biases, block masks or sinks may be added on the way or beside. So a twin of the model, few
layers, narrow, of random weights, runs with its own attention and with ours before the model itself is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.hf.attention import interface, twin
from gaugekit.hf.upstream import unfit

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.utils import logging
except ImportError as error:
    raise unfit(__name__, error) from error

NAME = "gaugekit_probe"  # our attention again, counted
# Rounding grows to some 1e-5 in a few layers; a mask or a term that is missing changes tenths.
LIMIT = torch.finfo(torch.float32).eps ** 0.5
_verdicts: dict[tuple, str | None] = {}


def adopt(model: nn.Module) -> str | None:
    """Sets our attention on ``model``, a transformers model or a wrapper of one; else why it stays as it was."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or not hasattr(model, "set_attn_implementation"):
        return "it is no transformers model, so there is no interface to set"
    interface.register()
    configs: set[int] = set()
    for part in inner.modules():
        if isinstance(part, PreTrainedModel) and id(part.config) not in configs:
            configs.add(id(part.config))
            if reason := verdict(type(part), part.config, whole=part is inner):
                return reason
    model.set_attn_implementation(interface.NAME)
    return None


def verdict(kind: type, config: Any, whole: bool = True) -> str | None:
    """Why models of this class and config may not have our attention, None where they may; asked once a process.

    A part of another model (``whole`` False) need not attend at all.
    """
    if whole and not (kind._supports_sdpa or kind._supports_attention_backend):
        return f"{kind.__name__} does not declare an attention interface"
    own = config._attn_implementation
    if own not in ("sdpa", "eager"):
        own = "sdpa" if kind._supports_sdpa else "eager"
    key = (kind, twin.plain(config).to_json_string(use_diff=False), own, whole)
    if key not in _verdicts:
        with quiet():
            _verdicts[key] = _ask(kind, config, own, whole)
    return _verdicts[key]


def _ask(kind: type, config: Any, own: str, whole: bool) -> str | None:
    reason = None
    for size in twin.smaller(config):
        with twin.aside():
            try:
                model = twin.make(kind, size, own)
                calls, before = _run(model)
            except Exception as error:  # these sizes do not fit this family: the next may
                reason = reason or f"{kind.__name__} cannot be tried on a small scale: {line(error)}"
                continue
            times: list[None] = []
            with _counted(times):
                try:
                    model.set_attn_implementation(NAME)
                    after = [call() for call in calls]
                except Exception as error:
                    return f"{kind.__name__} does not run with it: {line(error)}"
        if times or not whole:
            agrees = all(same(*pair) for pair in zip(before, after, strict=True))
            return None if agrees else f"{kind.__name__} computes something else with it"
        reason = f"{kind.__name__} never asks transformers' attention interface"
    return reason


def _run(model: nn.Module) -> tuple[list[Callable], list[list[Tensor]]]:
    """The calls that run with the model's own attention, the first of which must, and what they return."""
    calls, outputs = twin.calls(model), []
    for call in list(calls):
        try:
            outputs.append(call())
        except Exception:
            if not outputs:
                raise
            calls.remove(call)
    return calls, outputs


@contextlib.contextmanager
def _counted(times: list[None]) -> Iterator[None]:
    """While open, our attention is registered once more, under ``NAME``, and each call is noted in ``times``."""

    def attend(*arguments: Any, **keywords: Any) -> Any:
        times.append(None)
        return interface.attend(*arguments, **keywords)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, interface.visible)
    yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' advice is about the user's model, not about ours."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return False
    return all(
        bool((a - b).norm() <= LIMIT * a.norm()) for a, b in zip(before, after, strict=True)
    )  # False for NaN


def line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
