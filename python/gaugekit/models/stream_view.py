"""The tensors of a residual stream: what the groups that act on it read and move, in whatever family."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaugekit.models.stream import Exchange, Junction, Stream

# What transformers calls heads that read the stream, logits aside
CLASSIFIERS = ("score", "classifier", "qa_outputs", "cls_classifier", "distillation_classifier")


@dataclass(frozen=True)
class StreamView:
    """The tensors of a model as one of its streams meets them, by the base model's names; the head's by its own.

    float64; meta tensors where only shapes are known. ``head`` says what makes logits of the stream: "own", a matrix of
    its own; "tied", the table of ``tokens``; "none" in a model that returns the stream, whose last norm everybody sees;
    "inner" where all that read the stream are among its junctions. Of a classifier ``stream.head`` is the module that
    makes its scores, "own".
    """

    stream: Stream
    tensors: Mapping[str, Tensor]
    head: str

    @classmethod
    def of(
        cls, stream: Stream, prefix: str, tensors: Mapping[str, Tensor], headed: bool, apart: bool = False
    ) -> StreamView:
        """The view in ``tensors`` by their full names; ``prefix`` stands before the base model's.

        ``headed``: whether the model makes logits of its stream, by the module ``stream.head``; where it does not, it
        may have the head of a classifier. ``apart``: a head that has a tensor shares none, whatever the config says.
        ValueError, with its name, for a weight that is missing, or where the model shows more than its last norm.
        """
        if stream.norm is None:
            return cls(stream, _taken(stream, prefix, tensors), "inner")
        if apart and cls.has_head(stream, tensors):
            stream = replace(stream, tied=False)
        classifiers = () if headed else _classifiers(stream, tensors)
        if not headed and stream.raw:
            raise ValueError(
                "model: it shows its stream before the last norm, which only a projection would read, and it has none"
            )
        if classifiers:
            stream = replace(stream, head=classifiers[0], heads=classifiers[1:], tied=False)
        elif not headed:
            stream = replace(stream, head=None, heads=())
        taken = _taken(stream, prefix, tensors)
        if stream.head is None:
            return cls(stream, taken, "none")
        if stream.tied:
            taken.pop(f"{stream.head}.weight", None)  # a file may hold the table twice
        return cls(stream, taken, "tied" if stream.tied else "own")

    @staticmethod
    def has_head(stream: Stream, names: Container[str]) -> bool:
        """Whether a model with tensors of these ``names`` has a head of its own."""
        if stream.head is None:
            return False
        part = stream.parts.get(stream.head)
        return (part.weight if part else f"{stream.head}.weight") in names

    @property
    def norms(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each norm whose readers may take up its gain, with them: those of the junctions, and the last before a head
        of its own.
        """
        inner = [(junction.norm, junction.readers) for junction in self.junctions if junction.norm]
        return [*inner, (self.stream.norm, self.heads)] if self.head == "own" and self.stream.norm else inner

    @property
    def heads(self) -> tuple[str, ...]:
        """The modules that read the last norm."""
        return tuple(path for path in (self.stream.head, *self.stream.heads) if path)

    @property
    def keys(self) -> set[str]:
        """The readers without a bias that take up a norm's all the same (see ``Junction``)."""
        return {path for junction in self.junctions for path in junction.keys}

    @property
    def junctions(self) -> list[Junction]:
        """Of all layers, in order."""
        return list(itertools.chain.from_iterable(self.stream.junctions))

    @property
    def tables(self) -> list[str]:
        """The tensors [..., D] in the sum that enters the stream, a token table that is the head as well aside."""
        stream, tied = self.stream, self.head == "tied"
        modules = [f"{path}.weight" for path in (None if tied else stream.tokens, stream.positions) if path]
        return [*modules, *(name for name in stream.tables if name in self.tensors)]

    @property
    def rows(self) -> list[str]:
        """All tensors [..., D] that are added to the stream: ``tables``, tied ones too, and biases of first norms."""
        tied = [f"{self.stream.tokens}.weight"] if self.head == "tied" else []
        shifts = [f"{norm}.bias" for norm in self.stream.entries]
        return [*tied, *self.tables, *(name for name in shifts if name in self.tensors)]

    @property
    def writers(self) -> list[tuple[str, str | None]]:
        """The modules that add to the stream, each with the name of the tensor that what it adds is multiplied by."""
        first = [(self.stream.patches, None)] if self.stream.patches else []
        return [*first, *((path, j.scale) for j in self.junctions for path in j.writers)]

    @property
    def exchanges(self) -> list[Exchange]:
        """Where a constant may go from one term of a sum to another."""
        stream, pairs = self.stream, list(self.stream.exchanges)
        if stream.tokens and stream.positions:
            pairs.append(Exchange((f"{stream.positions}.weight",), f"{stream.tokens}.weight"))
        if self.head == "tied":  # a head shows what its table takes up
            pairs = [pair for pair in pairs if pair.taker != f"{stream.tokens}.weight"]
        for junction in self.junctions:
            biases = [f"{path}.bias" for path in junction.writers if self.read(f"{path}.bias") is not None]
            pairs += [Exchange((bias,), biases[-1]) for bias in biases[:-1]]
        pairs = [pair for pair in pairs if pair.givers[0] in self.tensors and pair.taker in self.tensors]
        return [
            replace(pair, givers=tuple(name for name in pair.givers if name in self.tensors))
            for pair in pairs
        ]

    @property
    def kept(self) -> list[str]:
        """The norms whose gains no reader can take up, so that a rotation has to leave them alone."""
        after = [junction.after for junction in self.junctions if junction.after]
        last = [self.stream.norm] if self.stream.norm and self.head != "own" else []
        return [*self.stream.entries, *after, *last]

    @property
    def still(self) -> str | None:
        """Why the stream cannot be turned, or only among channels whose gains agree; None where it can."""
        if self.stream.unturned:
            return self.stream.unturned
        if self.head == "none":
            return "its stream is its output"
        if self.head == "tied":
            return "its head shares the table of embeddings, so that only channels of the same gains turn"
        if self.kept:
            return "it takes channels of the same gain in each norm that stands on the stream itself"
        return None

    def read(self, name: str) -> Tensor | None:
        """A tensor by name; None where the model has none of it."""
        return self.tensors.get(name)

    def gain(self, norm: str) -> Tensor:
        """[D] what a norm multiplies by."""
        return self.tensors[f"{norm}.weight"] + self.stream.offset

    def with_gain(self, norm: str, gain: Tensor, shift: Tensor | None) -> StreamView:
        """The view with another gain and bias of a norm."""
        tensors = {f"{norm}.weight": gain - self.stream.offset}
        return self.with_tensors(tensors if shift is None else tensors | {f"{norm}.bias": shift})

    def linear(self, path: str) -> tuple[Tensor, Tensor | None]:
        """Weight [outputs, inputs] and bias of a module that reads or writes the stream.

        Of a head that reads several tokens at once [labels, n·D] the weight is [labels·n, D]; of a convolution
        [D, inputs of a patch].
        """
        if (part := self.stream.parts.get(path)) is not None:
            rows = slice(part.first, part.end)
            return self.tensors[part.weight][rows], self.tensors[part.bias][rows]
        weight = self.tensors[f"{path}.weight"].flatten(1)
        if path in self.heads:
            weight = weight.reshape(-1, self.stream.size)
        return (weight.mT if self._transposed(path) else weight), self.read(f"{path}.bias")

    def with_linear(self, path: str, weight: Tensor, bias: Tensor | None) -> StreamView:
        """The view with another weight [outputs, inputs] and bias there."""
        if (part := self.stream.parts.get(path)) is not None:
            rows = torch.arange(part.first, part.end)
            new = {part.weight: weight, part.bias: bias}
            return self.with_tensors(
                {name: self.tensors[name].index_copy(0, rows, x) for name, x in new.items()}
            )
        name = f"{path}.weight"
        stored = (weight.mT if self._transposed(path) else weight).reshape(self.tensors[name].shape)
        return self.with_tensors({name: stored} if bias is None else {name: stored, f"{path}.bias": bias})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> StreamView:
        """The view with other ``tensors`` of the same names."""
        return replace(self, tensors={**self.tensors, **tensors})

    def _transposed(self, path: str) -> bool:
        return self.stream.transposed and path not in self.heads


def heads_apart(stream: Stream, prefix: str, names: Container[str], read: Callable[[str], Tensor]) -> bool:
    """Whether a file with tensors of these ``names`` holds a head whose numbers are not the table's: transformers then
    unties the two, whatever the config says.
    """
    if not StreamView.has_head(stream, names) or stream.tokens is None:
        return False
    head, table = read(f"{stream.head}.weight"), read(f"{prefix}{stream.tokens}.weight")
    return not torch.equal(head, table)


def _classifiers(stream: Stream, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The modules that make a classifier's scores of the stream, by their matrices [labels, n·D]."""
    weights = {path: tensors.get(f"{path}.weight") for path in CLASSIFIERS}
    return tuple(
        path
        for path, weight in weights.items()
        if weight is not None and weight.dim() == 2 and weight.shape[1] == stream.reads * stream.size
    )


def _taken(stream: Stream, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a stream by its own names, out of those of a model."""
    taken, own = {}, tuple(f"{path}." for path in (stream.head, *stream.heads) if path)
    for name in _names(stream):
        stored = name if name.startswith(own) else prefix + name
        if stored in tensors:
            taken[name] = tensors[stored]
        elif name.endswith(".weight") and not (stream.tied and name.startswith(own)):
            raise ValueError(f"model: its stream needs a tensor named {stored!r}, and there is none")
    return taken


def _names(stream: Stream) -> Iterator[str]:
    """The names of all tensors that a stream may have; it need not have all of them."""
    paths = [stream.tokens, stream.positions, stream.patches, stream.norm, stream.head]
    paths += [*stream.heads, *stream.entries]
    names = [*stream.tables]
    for junction in itertools.chain.from_iterable(stream.junctions):
        paths += [junction.norm, *junction.readers, *junction.writers, junction.after]
        names += [junction.scale] if junction.scale else []
    for part in stream.parts.values():
        names += [part.weight, part.bias]
    yield from names
    for path in paths:
        if path is not None and path not in stream.parts:
            yield from (f"{path}.weight", f"{path}.bias")
