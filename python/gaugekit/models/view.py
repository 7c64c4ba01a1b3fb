"""What the house sees of one attention layer, whatever family it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """One of q, k, v, o, split by head, float64.

    q, k, v: ``y_h = x @ weight[h] + bias[h]`` with ``weight`` [heads, D, width] and ``bias`` [heads, width] or None.
    o: ``y = sum_h x_h @ weight[h] + bias`` with ``weight`` [H, V, D] and ``bias`` [D] or None.
    ``rows`` [heads, width] int64, where a gauge has been fixed: ``weight[h, rows[h]]`` is the identity, exactly.
    """

    weight: Tensor
    bias: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class AttentionView:
    """The attention of one layer: q [H, D, K], k [G, D, K], v [G, D, V], o [H, V, D].

    Query head h reads group h // (H/G). ``scale`` multiplies the scores; ``rotary`` is the number of channels turned
    by position (0: none); ``causal``: no token sees a later one.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    scale: float
    rotary: int = 0
    causal: bool = False

    @property
    def heads(self) -> int:
        """H, the number of query heads."""
        return self.q.weight.shape[0]

    @property
    def groups(self) -> int:
        """G, the number of key/value heads."""
        return self.k.weight.shape[0]

    @property
    def repeats(self) -> int:
        """H/G, how many query heads share a key/value head."""
        return self.heads // self.groups

    def attend(self, x: Tensor) -> Tensor:
        """softmax(scale·q kᵀ) v Wₒ + bₒ for ``x`` [B, T, D] in the view's dtype: the layer as its formula says, T×T.

        It is the measure of what a rewrite does to a layer; it raises ValueError for a rotary view.
        """
        if self.rotary:
            raise ValueError(f"attend: expected a view without rotary positions, got rotary={self.rotary}")
        q, k, v = (_project(x, part) for part in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(self.repeats, dim=1) for part in (k, v))
        scores = self.scale * q @ k.mT
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        mixed = torch.einsum("bhtv,hvd->btd", scores.softmax(-1) @ v, self.o.weight)
        return mixed if self.o.bias is None else mixed + self.o.bias


def _project(x: Tensor, part: Projection) -> Tensor:
    y = torch.einsum("btd,hdk->bhtk", x, part.weight)
    return y if part.bias is None else y + part.bias[:, None]


@dataclass(frozen=True)
class Compact:
    """How a projection is stored by a form: the form's name, its arguments (JSON values), its tensors by name."""

    form: str
    arguments: dict
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def spec(self) -> dict:
        """What ``config.json`` says of it."""
        return {"form": self.form, "arguments": self.arguments}


@dataclass(frozen=True)
class Stored:
    """A layer's attention as a family stores it: tensors by name, and the specs of modules that are forms now."""

    tensors: dict[str, Tensor]
    modules: dict[str, dict]


def parameters(view: AttentionView) -> int:
    """The numbers a dense checkpoint stores for this view."""
    parts = (view.q, view.k, view.v, view.o)
    return sum(part.weight.numel() + (0 if part.bias is None else part.bias.numel()) for part in parts)
