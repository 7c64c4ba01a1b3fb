"""What may be changed in a whole model without being seen: groups that act on the residual stream and on the MLPs.

With x the stream, g and β the gain and bias of a norm n, and W what reads it (row vectors, y = (g ⊙ n(x) + β) Wᵀ + b),
the model's logits do not move under

- norm_gains: g → g ⊙ s, β → β ⊙ s, W → W diag(1/s), D numbers a norm
- norm_biases: β → β + e, b → b − W e, where everything that reads the norm has a bias
- stream_means, where norms subtract the mean: one number for each row that is added to the stream, and each that reads
- stream_offsets: a constant that goes from one table of embeddings to the other, or between the biases of parts that
  write to the stream side by side
- stream_rotation: x → x Q with Q in O(D), or in O(D − 1), what leaves 1ᵀ alone, where norms subtract the mean
- neuron_scales: a hidden unit's way in times s, its way out times 1/s, where the MLP is gated or f(s x) = s f(x), s > 0
- layer_scales: where diag(λ) multiplies what W adds to the stream, λ → λ ⊙ s and W → diag(1/s) W

A head that shares the table of embeddings is turned with it, and its last norm's gain stands between the two: a
rotation then has to leave that gain alone, which is possible only among channels of the same gain. So is a model whose
stream is its output: there everyone sees the last norm. So is one with a norm behind a part or before the first block,
whose answer is added as it is: n(u) diag(g) Q is n(u Q) diag(g) for such a Q alone. Models that put their norms on the
stream itself, after the sum (BERT), have none of these: the skip carries g ⊙ n(x) + β on, so no gain can leave the norm
and no rotation passes it.

A model may have several streams, which share no tensor (``streams_of``). The end of an encoder's is read by the
decoder's keys and values. A bias that keys lack they need not have: what β adds to all of them, softmax does not see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor, nn

from gaugekit.models import Live, StreamView
from gaugekit.models.stream_view import stands, views


class StreamSymmetry(ABC):
    """A group acting on the stream of a whole model. ``name`` is the group's word in every report.

    Elements are one row of numbers (a rotation: its matrix). ``dimension`` asks for shapes alone; where gains of norms
    are there too, it takes them into account.
    """

    name: str

    @abstractmethod
    def dimension(self, view: StreamView) -> int:
        """The numbers nobody can observe; 0 where the group does not act on this view."""

    @abstractmethod
    def random(self, view: StreamView, generator: Generator | None = None) -> Tensor:
        """A random element, float64 and well conditioned."""

    @abstractmethod
    def act(self, view: StreamView, element: Tensor) -> StreamView:
        """The view moved by ``element``; ValueError for one of another shape, or where the group does not act."""

    @abstractmethod
    def fix(self, view: StreamView) -> StreamView:
        """One point of the orbit, the same from wherever it starts."""

    def contains(self, view: StreamView, other: StreamView) -> bool:
        """Membership: whether some element carries ``view`` to ``other``, to the rounding of float64."""
        mine, theirs = self.fix(view).tensors, self.fix(other).tensors
        bound = 64 * torch.finfo(torch.float64).eps * view.stream.size
        return mine.keys() == theirs.keys() and all(
            tensor.shape == theirs[name].shape
            and bool(
                (tensor - theirs[name]).abs().max()
                <= bound * max(tensor.abs().max(), theirs[name].abs().max())
            )
            for name, tensor in mine.items()
        )

    def _check(self, view: StreamView, element: Tensor) -> Tensor:
        size = self.dimension(view)
        if size == 0:
            raise ValueError(f"{self.name}: this model has no such freedom")
        if element.shape != (size,):
            raise ValueError(f"element of {self.name}: expected shape ({size},), got {tuple(element.shape)}")
        return element


def streams_of(model: nn.Module) -> tuple[StreamView, ...]:
    """The streams of a live transformers model, float64; ValueError, with the reason, where its family has no view."""
    live = Live(model)
    tensors = {
        name: parameter.detach().to("cpu", torch.float64, copy=True)
        for name, parameter in model.named_parameters()
    }
    modules = {name for name, _ in model.named_modules()}
    return tuple(views(live.family, live.prefix, tensors, lambda stream: stands(stream, modules)))


def stream_of(model: nn.Module) -> StreamView:
    """The stream of a live model that has one; ValueError, beside ``streams_of``'s, where it has several."""
    views = streams_of(model)
    if len(views) > 1:
        raise ValueError(f"model: expected one stream, got {len(views)}; symmetry.streams_of gives them all")
    return views[0]


def put_stream(model: nn.Module, view: StreamView) -> None:
    """Copies the tensors of a view into the live model it was taken of, rounded to its dtype."""
    prefix, own = Live(model).prefix, tuple(f"{head}." for head in view.heads)
    for name, tensor in view.tensors.items():
        stored = name if name.startswith(own) else prefix + name
        model.get_parameter(stored).data.copy_(tensor)


def factors(size: int, generator: Generator | None) -> Tensor:
    """Between ½ and 2."""
    return 2 ** (2 * torch.rand(size, dtype=torch.float64, generator=generator) - 1)


def nonzero(gain: Tensor) -> Tensor:
    """``gain`` with 1 for 0: a channel that a gain of 0 hides has nothing to be divided by."""
    return torch.where(gain == 0, 1.0, gain)


def without_mean(size: int) -> Tensor:
    """[size − 1, size] orthonormal rows, none with a mean."""
    rows = torch.cat([torch.ones(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)[:-1]])
    return torch.linalg.qr(rows.mT).Q[:, 1:].mT
