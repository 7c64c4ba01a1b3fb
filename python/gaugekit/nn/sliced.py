"""The residual stream of a sliced model: its norms, the layers that write to it, and what carries x past them.

Between two junctions the stream changes its basis, ``x ← x S + writer(...)``, where an unsliced block only adds. The
block's own code stays: its last writer before the sum answers ``writer(...) + x S − x``, and the block adds x. It gets
x from the norm that read it, through a ``Carry`` which both hold. Ashkboos et al., SliceGPT (ICLR 2024), section 3.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional

from gaugekit.nn.shortcuts import Shortcut


class Carry:
    """Takes x from a norm to the writer that ends its junction, in the same call of the same thread."""

    def __init__(self):
        self._held: dict[int, Tensor] = {}

    def put(self, x: Tensor) -> None:
        """Keeps x until ``take``."""
        self._held[_thread()] = x

    def take(self) -> Tensor:
        """What this thread put last; RuntimeError where it put nothing: the norm did not run before."""
        try:
            return self._held.pop(_thread())
        except KeyError:
            raise RuntimeError(
                "a sliced layer ran without the norm before it, which hands it the stream; compile whole blocks or "
                "whole models, not a norm or an MLP alone"
            ) from None


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()  # a graph runs in one thread


class SlicedNorm(nn.Module):
    """``y = x · rsqrt(Σᵢ xᵢ² / size + eps)`` over the first ``width`` entries of x; any others are zeros.

    The entries cut away counted in the mean of the unsliced norm, so the divisor stays ``size``, D. Gains stand in the
    layers that read y. x is handed to ``carry`` (None for the last norm). Computed in float32 at least, returned in
    x's dtype.
    """

    def __init__(self, size: int, width: int, eps: float, carry: Carry | None = None):
        super().__init__()
        self.size, self.width, self.eps, self.carry = size, width, eps, carry

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : self.width]
        if self.carry is not None:
            self.carry.put(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.size + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width} of {self.size}, eps={self.eps}"


class SlicedWriter(nn.Module):
    """``y = x Wᵀ + b``, padded with zeros to ``padded`` columns; the last of a junction adds what its shortcut does.

    weight [outputs, inputs], bias [outputs] or None. ``shortcut`` and ``carry`` are None for a writer with others after
    it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        *,
        padded: int,
        shortcut: Shortcut | None = None,
        carry: Carry | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        make = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.padded = inputs, outputs, padded
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **make))
        self.bias = nn.Parameter(torch.empty(outputs, **make)) if bias else None
        self.shortcut, self.carry = shortcut, carry

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        if self.shortcut is not None:
            y = self.shortcut(y, self.carry.take().reshape(*y.shape[:-1], -1))
        return functional.pad(y, (0, self.padded - y.shape[-1])) if self.padded > y.shape[-1] else y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


class RotatedEmbedding(nn.Module):
    """``y = E[ids] R``: a table E [N, D] as it was, for a head to share, led into a sliced basis by R [D, D′]."""

    def __init__(
        self,
        table: nn.Embedding,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.weight.shape
        self.padding_idx = table.padding_idx
        self.weight = table.weight
        size = self.embedding_dim
        self.rotation = nn.Parameter(torch.empty(size, width, device=device, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight, self.padding_idx) @ self.rotation

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim} -> {self.rotation.shape[1]}"


class RotatedHead(nn.Module):
    """``logits = (x R + b) Eᵀ``: a head that shares the table E [N, D] of the embedding, for x in a sliced basis.

    ``rotation`` R [D′, D] holds the last norm's gain, ``offset`` b [D] its bias (None without).
    """

    def __init__(
        self,
        head: nn.Linear,
        width: int,
        offset: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        make = {"device": device, "dtype": dtype}
        self.out_features, self.in_features = head.weight.shape
        self.weight, self.bias = head.weight, head.bias
        self.rotation = nn.Parameter(torch.empty(width, self.in_features, **make))
        self.offset = nn.Parameter(torch.empty(self.in_features, **make)) if offset else None

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.rotation
        return functional.linear(x if self.offset is None else x + self.offset, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.rotation.shape[0]} -> {self.in_features} -> {self.out_features}"
