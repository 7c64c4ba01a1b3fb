"""The tensors of a residual stream: what the groups that act on it read and move, in whatever family."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaugekit.models.family import Family
from gaugekit.models.stream import Exchange, Junction, Stream

# What transformers calls heads that read the stream, logits aside
CLASSIFIERS = (
    "score", "classifier", "qa_outputs", "cls_classifier", "distillation_classifier", "multiple_choice_head.summary"
)  # fmt: skip
LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class StreamView:
    """The tensors of a model as one of its streams meets them, by the base model's names; the head's by its own.

    float64; meta tensors where only shapes are known. ``head`` says what makes logits of the stream: "own", a matrix of
    its own; "tied", the table of ``tokens``; "none" in a model that returns the stream, whose last norm everybody sees;
    "inner" where all that read the stream are among its junctions. Of a classifier ``stream.head`` is the module that
    makes its scores, "own". ``stranger`` names a tensor of the model that may read the stream's end, too, and has no
    view: the last norm and the basis are left as they are then.
    """

    stream: Stream
    tensors: Mapping[str, Tensor]
    head: str
    stranger: str | None = None

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
        classifiers = _classifiers(stream, tensors)
        if not headed and stream.raw:
            raise ValueError(
                "model: it shows its stream before the last norm, which only a projection would read, and it has none"
            )
        if headed:
            stream = replace(stream, heads=classifiers)
        elif classifiers:
            stream = replace(stream, head=classifiers[0], heads=classifiers[1:], tied=False)
        else:
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
        return (
            inner if self.stream.norm is None or self._last_kept else [*inner, (self.stream.norm, self.heads)]
        )

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
        last = [self.stream.norm] if self.stream.norm and self._last_kept else []
        return [*self.stream.entries, *after, *last]

    @property
    def still(self) -> str | None:
        """Why the stream cannot be turned, or only among channels whose gains agree; None where it can."""
        if self.stream.unturned:
            return self.stream.unturned
        if self.head == "none":
            return "its stream is its output"
        if self.stranger:
            return f"{self.stranger!r} may read it and has no view here"
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
        return self.stream.transposed and path not in (*self.heads, self.stream.tokens)

    @property
    def _last_kept(self) -> bool:
        """Whether something reads the last norm that cannot take up its gain."""
        return self.head != "own" or self.stranger is not None


def heads_apart(stream: Stream, prefix: str, names: Container[str], read: Callable[[str], Tensor]) -> bool:
    """Whether a file with tensors of these ``names`` holds a head whose numbers are not the table's: transformers then
    unties the two, whatever the config says.
    """
    table = f"{prefix}{stream.tokens}.weight"
    if not StreamView.has_head(stream, names) or table not in names:
        return False
    return not torch.equal(read(f"{stream.head}.weight"), read(table))


def views(
    family: Family,
    prefix: str,
    tensors: Mapping[str, Tensor],
    headed: Callable[[Stream], bool],
    same: Callable[[str, str], bool] = lambda head, table: False,
) -> Iterator[StreamView]:
    """The views of all streams of a model of ``family`` in ``tensors``, one after the other, as ``StreamView.of``.

    ``same``: whether two tensors, by their full names, hold the same numbers, as a file may that holds a shared table
    twice; in memory what shares a tensor has one name. Raises ValueError, with the reason, beside those of ``of`` for a
    tensor in the base model that no view knows (``strangers``) and for tables that are no copies of each other.
    """
    streams = family.streams()
    known = {name for layer in range(family.layers) for name in family.shapes(layer)}
    beyond = strangers(streams, known, prefix, {name: tensor.shape for name, tensor in tensors.items()})
    for stream in streams:
        table, head = f"{prefix}{stream.tokens}.weight", f"{stream.head}.weight"
        tables = [
            prefix + name for name in (f"{stream.tokens}.weight", *stream.copies) if prefix + name in tensors
        ]
        tables = tables or (
            [head] if stream.tied and head in tensors else []
        )  # whichever of the two a file holds
        for other in tables[1:]:
            if not same(other, tables[0]):
                raise ValueError(
                    f"model: {other!r} is a table of its own beside {tables[0]!r}, which no view knows"
                )
        there = {**tensors, table: tensors[tables[0]]} if tables else tensors
        apart = not stream.tied or head not in tensors or not same(head, tables[0])
        view = StreamView.of(stream, prefix, there, headed(stream), apart)
        yield replace(view, stranger=beyond[0]) if beyond and view.head != "inner" else view


def strangers(
    streams: Collection[Stream], known: Iterable[str], prefix: str, sizes: Mapping[str, Sequence[int]]
) -> list[str]:
    """The names of those of a model's tensors, of these ``sizes``, that no adapter knows and that could read the end of
    a stream: outside of the base model, with an axis of n·D.

    ``known`` are the names of the attentions' tensors, without ``prefix``. Raises ValueError, with its name, for one
    inside of the base model with an axis of D: it could stand anywhere.
    """
    paths = [path for stream in streams for path in (stream.head, *stream.heads) if path]
    ends = {f"{path}.{leaf}" for path in (*paths, *CLASSIFIERS) for leaf in LEAVES}
    own = {name for stream in streams for name in (*_names(stream), *stream.copies)} | {*known}
    beside = {path for stream in streams for path in stream.beside}
    places = tuple({f"{name.partition('.')[0]}." for name in own - ends})
    widths, beyond = {stream.size for stream in streams}, []
    for name, size in sizes.items():
        short, inside = name.removeprefix(prefix), name.startswith(prefix if prefix else places)
        if (
            name in ends
            or (inside and short in own)
            or any(f"{short}.".startswith(f"{path}.") for path in beside)
        ):
            continue
        if inside and widths & {*size}:
            raise ValueError(
                f"model: {name!r} has the width of its stream, and no view knows what it does there"
            )
        if not inside and any(axis and axis % width == 0 for axis in size for width in widths):
            beyond.append(name)
    return beyond


def stands(stream: Stream, modules: Collection[str]) -> bool:
    """Whether a live model with ``modules`` of these paths has the head of a stream; ValueError where it is deeper."""
    if stream.head is None or stream.head in modules:
        return stream.head is not None
    deeper = next((path for path in modules if path.endswith(f".{stream.head}")), None)
    if deeper is not None:
        raise ValueError(f"model: expected its head at {stream.head!r}, found it at {deeper!r}")
    return False


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
