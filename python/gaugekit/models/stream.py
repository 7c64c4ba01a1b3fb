"""The residual stream of a model: who reads it, through which norm, and who adds to it, in whatever family."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

CLASSIFIERS = (
    "score",
    "classifier",
    "qa_outputs",
)  # what transformers calls heads that read the stream, logits aside


@dataclass(frozen=True)
class Mlp:
    """The hidden units of an MLP: down(f(up(x))), or down(f(gate(x)) · up(x)) where there is a ``gate``.

    Paths of modules as in ``Junction``; ``activation`` is f, by transformers' name for it.
    """

    up: str
    down: str
    activation: str
    gate: str | None = None


@dataclass(frozen=True)
class Junction:
    """One place where a block reads the stream x and adds to it: ``x ← x + Σ writer(..., reader(norm(x)))``.

    Paths of modules, without the base model's prefix. The last of ``writers`` is the last that runs. A module that is
    missing from a config (an MLP without bias) is no matter: tensors are asked for by name. ``mlp`` tells which of them
    are an MLP's, where one of the parts is an MLP with one layer of hidden units.
    """

    norm: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    mlp: Mlp | None = None


@dataclass(frozen=True)
class Stream:
    """The stream of a whole model: ``junctions[layer]`` in the order a block runs them, and both its ends.

    ``tokens`` and ``positions`` (None without) are the embeddings whose sum is the stream before layer 0, ``norm`` the
    last norm; ``head`` is the module of a model with a head that makes logits of it, by its path in that model (no
    prefix), ``tied`` whether it shares the matrix of ``tokens``. ``eps`` and ``centred`` are those of every norm:
    centred ones subtract the mean first (LayerNorm). ``transposed``: the modules of the blocks keep their weights
    [inputs, outputs]. ``dropouts`` are the entries of the config that drop parts of the stream, or whole layers, in
    training. ``size`` is D.
    """

    size: int
    junctions: tuple[tuple[Junction, ...], ...]
    tokens: str
    positions: str | None
    norm: str
    head: str
    tied: bool
    eps: float
    centred: bool
    transposed: bool = False
    dropouts: tuple[str, ...] = ()

    @property
    def places(self) -> int:
        """How many junctions there are in all."""
        return sum(map(len, self.junctions))


@dataclass(frozen=True)
class StreamView:
    """The tensors of a whole model as its stream meets them, by the base model's names; the head's by its own.

    float64; meta tensors where only shapes are known. ``head`` says what makes logits of the stream: "own", a matrix of
    its own; "tied", the table of ``tokens``; "none" in a model that returns the stream, whose last norm everybody sees.
    Of a classifier ``stream.head`` is the module that makes its scores, "own".
    """

    stream: Stream
    tensors: Mapping[str, Tensor]
    head: str

    @classmethod
    def of(cls, stream: Stream, prefix: str, tensors: Mapping[str, Tensor], headed: bool) -> StreamView:
        """The view in ``tensors`` by their full names; ``prefix`` stands before the base model's.

        ``headed``: whether the model makes logits of its stream, by the module ``stream.head``; where it does not, it
        may have the head of a classifier. ValueError, with its name, for a weight that is missing.
        """
        if not headed and (classifier := _classifier(stream, tensors)) is not None:
            stream, headed = replace(stream, head=classifier, tied=False), True
        taken, own = {}, f"{stream.head}."
        for name in _names(stream):
            stored = name if name.startswith(own) else prefix + name
            if stored in tensors:
                taken[name] = tensors[stored]
            elif name.endswith(".weight") and (not name.startswith(own) or (headed and not stream.tied)):
                raise ValueError(f"model: its stream needs a tensor named {stored!r}, and there is none")
        if not headed:
            return cls(
                stream, {name: tensor for name, tensor in taken.items() if not name.startswith(own)}, "none"
            )
        if stream.tied:
            taken.pop(f"{own}weight", None)  # a file may hold the table twice
        return cls(stream, taken, "tied" if stream.tied else "own")

    @property
    def norms(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each norm whose readers may take up its gain, with them: those of the junctions, and the last before a head
        of its own.
        """
        inner = [(junction.norm, junction.readers) for junction in self.junctions]
        return [*inner, (self.stream.norm, (self.stream.head,))] if self.head == "own" else inner

    @property
    def junctions(self) -> list[Junction]:
        """Of all layers, in order."""
        return list(itertools.chain.from_iterable(self.stream.junctions))

    @property
    def tables(self) -> list[str]:
        """The tables whose sum enters the stream, a token table that is the head as well aside."""
        stream, tied = self.stream, self.head == "tied"
        return [f"{path}.weight" for path in (None if tied else stream.tokens, stream.positions) if path]

    def read(self, name: str) -> Tensor | None:
        """A tensor by name; None where the model has none of it."""
        return self.tensors.get(name)

    def linear(self, path: str) -> tuple[Tensor, Tensor | None]:
        """Weight [outputs, inputs] and bias of a module that reads or writes the stream."""
        weight = self.tensors[f"{path}.weight"]
        return (weight.mT if self._transposed(path) else weight), self.read(f"{path}.bias")

    def with_linear(self, path: str, weight: Tensor, bias: Tensor | None) -> StreamView:
        """The view with another weight [outputs, inputs] and bias there."""
        tensors = {f"{path}.weight": weight.mT if self._transposed(path) else weight}
        return self.with_tensors(tensors if bias is None else tensors | {f"{path}.bias": bias})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> StreamView:
        """The view with other ``tensors`` of the same names."""
        return replace(self, tensors={**self.tensors, **tensors})

    def _transposed(self, path: str) -> bool:
        return self.stream.transposed and path != self.stream.head


def _classifier(stream: Stream, tensors: Mapping[str, Tensor]) -> str | None:
    """The module that makes a classifier's scores of the stream, by its matrix [labels, D]; None without one."""
    for path in CLASSIFIERS:
        weight = tensors.get(f"{path}.weight")
        if weight is not None and weight.dim() == 2 and weight.shape[1] == stream.size:
            return path
    return None


def _names(stream: Stream) -> Iterator[str]:
    """The names of all tensors that the stream of a model may have; it need not have all of them."""
    paths = [stream.tokens, stream.positions, stream.norm, stream.head]
    for junction in itertools.chain.from_iterable(stream.junctions):
        paths += [junction.norm, *junction.readers, *junction.writers]
    for path in paths:
        if path is not None:
            yield from (f"{path}.weight", f"{path}.bias")


def folded(
    weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What reads a norm, with that norm's ``gain`` and bias ``shift`` in it: W diag(g) and b + W β.

    ``weight`` [outputs, D]. A ``bias`` of None stays None: a shift that is not zero then has no place to go.
    """
    if shift is not None and bias is not None:
        bias = bias + weight @ shift
    return weight * gain, bias


def centred(matrix: Tensor) -> Tensor:
    """Rows of ``matrix`` [..., D] without their mean: what a norm that subtracts the mean sees of them."""
    return matrix - matrix.mean(-1, keepdim=True)
