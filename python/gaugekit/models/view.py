"""What the house sees of one attention layer, whatever family it comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """One of q, k, v, o, split by head, float64.

    q, k, v: ``y_h = x @ weight[h] + bias[h]`` with ``weight`` [heads, D, width] and ``bias`` [heads, width] or None.
    o: ``y = sum_h x_h @ weight[h] + bias`` with ``weight`` [H, V, D] and ``bias`` [D] or None.
    ``rows`` [heads, width] int64, where a gauge has been fixed: ``weight[h, rows[h]]`` is the identity, exactly, or
    lower triangular where ``triangular``.
    ``dtype`` is the one the numbers were rounded to where they are stored: what tells a small singular value from
    rounding (``rank.spectra.rounding_norm``).
    """

    weight: Tensor
    bias: Tensor | None = None
    rows: Tensor | None = None
    dtype: torch.dtype = torch.float64
    triangular: bool = False


@dataclass(frozen=True)
class Norms:
    """What queries and keys go through before they are turned: y = (offset + gain) ⊙ x / √(mean x² + eps).

    ``q`` [H, K] and ``k`` [G, K] are the gains as they are stored, float64; [1, K] where all heads share one.
    ``offset`` is what the family adds to them (1 in Gemma). ``centred``: the mean is subtracted first (LayerNorm).
    ``whole``: means run over the channels of all heads at once (OLMo 2), else over each head's own.
    """

    q: Tensor
    k: Tensor
    eps: float
    offset: float = 0.0
    centred: bool = False
    whole: bool = False

    def gain(self, part: str) -> Tensor:
        """What multiplies the channels of ``part``, "q" or "k": [heads or 1, K]."""
        return self.offset + getattr(self, part)

    def apply(self, x: Tensor, part: str) -> Tensor:
        """Queries or keys ``x`` [B, heads, T, K] as they leave the norm of ``part``."""
        over = (1, 3) if self.whole else 3
        if self.centred:
            x = x - x.mean(over, keepdim=True)
        return (
            x * torch.rsqrt(x.square().mean(over, keepdim=True) + self.eps) * self.gain(part)[:, None].to(x)
        )


@dataclass(frozen=True)
class Cut:
    """Where a live model holds the weights of q, k or v of one layer, to be read as they are, without a copy.

    They are the ``heads`` · ``width`` outputs from ``start`` on of the linear module at ``path``, whose weight is [in,
    out] where it is ``transposed``, else [out, in].
    """

    path: str
    heads: int
    width: int
    start: int = 0
    transposed: bool = False

    def weight(self, module: nn.Module) -> Tensor:
        """[heads, width, D], a view of the weight of ``module``, the one at ``path``."""
        outputs = module.weight.mT if self.transposed else module.weight
        return outputs[self._rows].unflatten(0, (self.heads, self.width))

    def bias(self, module: nn.Module) -> Tensor | None:
        """[heads, width], a view; None without one."""
        return None if module.bias is None else module.bias[self._rows].unflatten(0, (self.heads, self.width))

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        """This part of what ``module`` makes of x [B, T, D]: [B, heads, T, width]."""
        weight, bias = self.weight(module).flatten(0, 1), self.bias(module)
        y = nn.functional.linear(x, weight, None if bias is None else bias.flatten())
        return y.unflatten(2, (self.heads, self.width)).transpose(1, 2)

    @property
    def _rows(self) -> slice:
        return slice(self.start, self.start + self.heads * self.width)


# Why a group may be left alone in a family (``AttentionView.barred``)
NORMS = "it normalises queries and keys, and no product W_Q W_Kᵀ stands alone between them"
# A bias of position that is only added to the scores (T5, MPNet) rules nothing out.
POSITIONS = (
    "it multiplies queries and keys with vectors of position, and its scores are no matter of W_Q W_Kᵀ alone"
)
CAPPED = "it caps the scores, which then show what shifts a whole row of them"


@dataclass(frozen=True)
class AttentionView:
    """The attention of one layer: q [H, D, K], k [G, D, K], v [G, D, V], o [H, V, D].

    Query head h reads group h // (H/G). ``scale`` multiplies the scores; ``rotary`` is the number of channels turned
    by position (0: none), the i-th of the ``pairs`` by position · base^(−2i/rotary): channel i < rotary/2 with
    i + rotary/2, or the neighbours 2i and 2i + 1 where they are ``interleaved``. ``causal``: no token sees a later one.
    ``slopes`` [H], where there are any: ALiBi, which adds slope · position of the key to the scores of a head.
    ``softcap`` c, where there is one, makes c · tanh(score/c) of each score. ``layer`` is its place in the model.
    ``channels`` [G][R_g] lists, where some are zero in queries and keys alike, those of the K channels that are not
    (ascending; None: all are in use). ``barred`` {group: reason} names the groups that are left alone in this family
    although the parts are there, and only those: what comes between queries and keys says nothing of values.
    ``cross``: keys and values read another sequence than queries do, the encoder's output. ``norms``: what
    queries and keys go through before they are turned (None: nothing, or norms that no group here knows).
    ``shared_bias`` names the table of biases of position that layers have in common, where there is one: each of its
    columns is a head's in all of them, so that their heads can change places only in all of them at once.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    scale: float
    rotary: int = 0
    causal: bool = False
    rotary_base: float = 10_000.0
    layer: int = 0
    channels: tuple[tuple[int, ...], ...] | None = None
    barred: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    slopes: tuple[float, ...] | None = None
    softcap: float | None = None
    cross: bool = False
    norms: Norms | None = None
    shared_bias: str | None = None

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

    @property
    def ranks(self) -> list[int]:
        """[G] how many of the K channels each key head uses."""
        if self.channels is None:
            return [self.k.weight.shape[2]] * self.groups
        return [len(kept) for kept in self.channels]

    @property
    def pairs(self) -> Tensor:
        """[2, rotary/2] int64: the channels that turn together, the pair i by position · base^(−2i/rotary)."""
        return rotary_pairs(self.rotary, self.interleaved)

    def attend(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """softmax(scale·q kᵀ) v Wₒ + bₒ for ``x`` [B, T, D] in the view's dtype: the layer as its formula says, T×T.

        ``memory`` [B, S, D] is what keys and values read in cross-attention, and there only.

        It is the measure of what a rewrite does to a layer. Rotary channels are turned by the base alone, without the
        corrections a config may ask for at long contexts: those change angles, not what a rewrite may do. Norms of
        queries and keys that have no view, learned biases of position and sliding windows are left out likewise: no
        rewrite touches what they stand on.
        """
        if self.cross != (memory is not None):
            expected, got = ("[B, S, D]", "None") if self.cross else ("None", "a tensor")
            raise ValueError(f"memory: expected {expected} in this layer, got {got}")
        read = x if memory is None else memory
        q, k, v = _project(x, self.q), _project(read, self.k), _project(read, self.v)
        if self.norms is not None:
            q, k = self.norms.apply(q, "q"), self.norms.apply(k, "k")
        if self.rotary:
            q, k = (_turn(part, self.pairs, self.rotary_base) for part in (q, k))
        k, v = (part.repeat_interleave(self.repeats, dim=1) for part in (k, v))
        scores = self.scale * q @ k.mT
        if self.slopes is not None:
            scores = scores + scores.new_tensor(self.slopes)[:, None, None] * torch.arange(
                x.shape[1], device=x.device
            )
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        mixed = torch.einsum("bhtv,hvd->btd", scores.softmax(-1) @ v, self.o.weight)
        return mixed if self.o.bias is None else mixed + self.o.bias


def _project(x: Tensor, part: Projection) -> Tensor:
    y = torch.einsum("btd,hdk->bhtk", x, part.weight)
    return y if part.bias is None else y + part.bias[:, None]


def rotary_pairs(rotary: int, interleaved: bool) -> Tensor:
    """[2, rotary/2] int64: (i, i + rotary/2), or the neighbours (2i, 2i + 1) where they are ``interleaved``."""
    order = torch.arange(rotary)
    return order.view(rotary // 2, 2).mT if interleaved else order.view(2, rotary // 2)


def _turn(x: Tensor, pairs: Tensor, base: float) -> Tensor:
    """x [B, heads, T, K], the ``pairs`` [2, n] of its channels turned by the position."""
    steps = torch.arange(pairs.shape[1], dtype=x.dtype, device=x.device)
    angle = torch.arange(x.shape[2], dtype=x.dtype, device=x.device)[:, None] * base ** (-steps / len(steps))
    left, right = (x[..., channels] for channels in pairs)
    turned = x.clone()
    turned[..., pairs[0]] = left * angle.cos() - right * angle.sin()
    turned[..., pairs[1]] = right * angle.cos() + left * angle.sin()
    return turned


def used_channels(view: AttentionView) -> tuple[tuple[int, ...], ...] | None:
    """``channels`` as the numbers show them: a channel is idle where queries and keys of a group are all exactly zero.

    Rotary channels count in pairs, and every group keeps at least its first. None where all are in use.
    """
    weights = [torch.cat([p.weight, p.weight[:, :1] * 0 if p.bias is None else p.bias[:, None]], 1)
               for p in (view.q, view.k)]  # fmt: skip
    q, k = ((weight != 0).any(1) for weight in weights)
    used = q.unflatten(0, (view.groups, -1)).any(1) | k
    left, right = view.pairs
    used[:, left] |= used[:, right]
    used[:, right] = used[:, left]
    first = view.pairs[:, 0] if view.rotary else torch.tensor([0])
    used[:, first] |= ~used.any(1, keepdim=True)
    if bool(used.all()):
        return None
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in used)


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


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; ValueError, with its ``name``, where finite numbers of it become infinite there."""
    cast = tensor.to(dtype)
    if dtype != tensor.dtype and bool((cast.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"dtype: {name} holds numbers too large for {dtype}")
    return cast


def parameters(view: AttentionView) -> int:
    """The numbers a dense checkpoint stores for this view."""
    parts = (view.q, view.k, view.v, view.o)
    return sum(part.weight.numel() + (0 if part.bias is None else part.bias.numel()) for part in parts)


def left_alone(barred: Sequence[Mapping[str, str]]) -> list[str]:
    """One sentence for each group and reason in ``barred`` of the layers, with their number unless it is all."""
    counts = Counter(pair for reasons in barred for pair in reasons.items())
    layers = len(barred)
    return [
        f"{group}: left alone{'' if count == layers else f' in {count} of {layers} layers'}, since {reason}"
        for (group, reason), count in counts.items()
    ]
