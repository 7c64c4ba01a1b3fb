"""Modules that make a tensor of their parameters and keep it while those stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaugekit.ops.gauge_linear.operator import transforms


class Copy(NamedTuple):
    """A tensor beside what it was made of; the aliases keep their memory from being given to other numbers."""

    tensor: Tensor
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]


class Keeping(nn.Module):
    """A module with one tensor made of some of its own: made once, then kept until one of those changes.

    A change past autograd's eyes (``parameter.data.copy_(...)``, as moving averages of weights do) is seen after the
    next ``train()`` or ``eval()``. What is kept is no part of a state_dict, of a pickle or of a copy.
    """

    _kept: Copy | None = None

    def kept(self, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        """``make()``, or what it gave last time; anew in every call where a gradient flows to ``sources``, in which a
        compiler or a transformation of functions looks on, or whose tensors do not count what is written to them.
        """
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in sources)
        if learns or torch.compiler.is_compiling() or transforms() or not all(map(_counts, sources)):
            return make()
        copy, versions = self._kept, tuple([x._version for x in sources])
        if copy is None or copy.versions != versions or not all(map(_same, copy.sources, sources)):
            # A tensor of inference mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                copy = Copy(make(), tuple(x.detach() for x in sources), versions)
            if type(copy.tensor) is not Tensor:  # made in a trace, for which it alone is good
                return copy.tensor
            self._kept = copy
        return copy.tensor

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard puts other numbers into the same memory, and counts no version; it sets the parameter before.
        if name in self.__dict__.get("_parameters", ()):
            self._kept = None
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Keeping:
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Keeping:
        self._kept = None  # moved or rounded numbers may come to lie where the old ones did
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


def _counts(x: Tensor) -> bool:
    """Whether the tensor has memory of its own and counts what is written to it."""
    return type(x) in (Tensor, nn.Parameter) and not (x.is_meta or x.is_inference())


def _same(before: Tensor, now: Tensor) -> bool:
    return before.data_ptr() == now.data_ptr() and before.dtype == now.dtype and before.device == now.device
