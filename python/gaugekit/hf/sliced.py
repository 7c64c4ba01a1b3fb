"""Puts the parts of a sliced model in place before its weights are read, as ``config.json`` says under ``sliced``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gaugekit import models
from gaugekit.models import Junction, Stream
from gaugekit.nn.shortcuts import DenseShortcut, PolarShortcut, Shortcut, TriangularShortcut
from gaugekit.nn.sliced import Carry, RotatedEmbedding, RotatedHead, SlicedNorm, SlicedWriter

FORMS = ("dense", "triangular", "polar")


@dataclass(frozen=True)
class Sliced:
    """How a model is sliced: {"width": D′, "form": "dense", "triangular" or "polar", "ranks": [...], "head": bool}.

    ``ranks``: of a polar form, the columns of Y for each shortcut from one sliced basis to the next, in the order of
    the model; empty for another form. ``head``: whether the last basis, which the head reads, is sliced too.
    """

    width: int
    form: str
    ranks: tuple[int, ...] = ()
    head: bool = False

    @staticmethod
    def read(spec: Any) -> Sliced:
        """Of the entry ``spec``; ValueError where it is none."""
        try:
            sliced = Sliced(spec["width"], spec["form"], tuple(spec["ranks"]), spec["head"])
            sound = set(spec) == {"width", "form", "ranks", "head"} and sliced._sound()
        except (TypeError, KeyError):
            sound = False
        if not sound:
            raise ValueError(
                f"quantization_config: sliced: expected width, form ({', '.join(FORMS)}), ranks and head, got {spec!r}"
            )
        return sliced

    def _sound(self) -> bool:
        numbers = (self.width, *self.ranks)
        counts = all(isinstance(number, int) and 0 <= number <= self.width for number in numbers)
        return counts and self.width > 0 and self.form in FORMS and isinstance(self.head, bool)

    def to_dict(self) -> dict:
        """The entry, JSON values."""
        return {"width": self.width, "form": self.form, "ranks": list(self.ranks), "head": self.head}

    def check(self, stream: Stream) -> None:
        """ValueError where the entry does not fit a model."""
        if self.width > stream.size:
            raise ValueError(f"sliced: width: expected at most {stream.size}, got {self.width}")
        inner = stream.places - (0 if self.head else 1)
        expected = inner if self.form == "polar" else 0
        if len(self.ranks) != expected:
            raise ValueError(f"sliced: ranks: expected {expected} of them, got {len(self.ranks)}")


def install(model: nn.Module, sliced: Sliced, dtype: torch.dtype | None = None) -> None:
    """Gives ``model`` the parts of a sliced one, their numbers still to be loaded, on the device torch is set to.

    Raises ValueError where its family has no view of the stream, or ``sliced`` does not fit it.
    """
    adapter = models.family(model.config.to_dict())
    stream = adapter.stream()
    sliced.check(stream)
    names = [name for name, _ in model.named_parameters()]
    _Parts(model, adapter.prefix(names), stream, sliced, dtype).install()


class _Parts:
    """One call of ``install``."""

    def __init__(self, model: nn.Module, prefix: str, stream: Stream, sliced: Sliced, dtype):
        self.model, self.prefix, self.stream, self.sliced = model, prefix, stream, sliced
        self.make = {"dtype": dtype}
        self.ranks = list(sliced.ranks)

    def install(self) -> None:
        stream, width = self.stream, self.sliced.width
        tokens = self._module(stream.tokens)
        if stream.tied:
            self._put(stream.tokens, RotatedEmbedding(tokens, width, **self.make))
        else:
            _narrow_table(tokens, width)
        if stream.positions is not None:
            _narrow_table(self._module(stream.positions), width)
        last = [junction for junctions in stream.junctions for junction in junctions][-1:]
        for junction in itertools.chain.from_iterable(stream.junctions):
            self._junction(junction, ends=[junction] == last and not self.sliced.head)
        if self.sliced.head:
            self._head()
        else:
            # The last junction leads into the unsliced stream that the head reads, and a block adds only what is as
            # wide as its input: so the stream has D columns all the way, zeros after the first D′.
            for path in filter(None, (stream.tokens, stream.positions)):
                self._module(path).register_forward_hook(Pad(stream.size))

    def _junction(self, junction: Junction, *, ends: bool) -> None:
        width, carry = self.sliced.width, Carry()
        padded = width if self.sliced.head else self.stream.size
        self._put(junction.norm, SlicedNorm(self.stream.size, width, self.stream.eps, carry))
        for reader in junction.readers:
            _narrow(self._module(reader), width, self.stream.transposed)
        outputs = padded if ends else width
        for writer in junction.writers:
            module = self._module(writer)
            inputs = module.weight.shape[0 if self.stream.transposed else 1]
            last = writer == junction.writers[-1]
            shortcut = self._shortcut(outputs, ends) if last else None
            biased = module.bias is not None
            more = {"shortcut": shortcut, "carry": carry if last else None, **self.make}
            self._put(writer, SlicedWriter(inputs, outputs, biased, padded=padded, **more))

    def _shortcut(self, outputs: int, ends: bool) -> Shortcut:
        width = self.sliced.width
        # Into a stream that is not sliced there is no basis to choose.
        if ends or self.sliced.form == "dense":
            return DenseShortcut(width, outputs, **self.make)
        if self.sliced.form == "triangular":
            return TriangularShortcut(width, **self.make)
        return PolarShortcut(width, self.ranks.pop(0), **self.make)

    def _head(self) -> None:
        stream, width = self.stream, self.sliced.width
        self._put(stream.norm, SlicedNorm(stream.size, width, stream.eps))
        head = (
            self.model.get_submodule(stream.head) if self.model.get_output_embeddings() is not None else None
        )
        if head is None:
            if self.model.base_model is not self.model:
                raise ValueError(
                    f"sliced: head: expected a causal language model or its bare model, got "
                    f"{type(self.model).__name__}, whose own head reads {stream.size} entries, not {width}; "
                    "slice without head=True (--slice-head) for it"
                )
            return
        if stream.tied:
            self.model.set_submodule(stream.head, RotatedHead(head, width, stream.centred, **self.make))
        else:
            _narrow(head, width, transposed=False)
            if stream.centred and head.bias is None:
                head.bias = nn.Parameter(head.weight.new_empty(head.weight.shape[0]))

    def _module(self, path: str) -> nn.Module:
        return self.model.get_submodule(self.prefix + path)

    def _put(self, path: str, module: nn.Module) -> None:
        self.model.set_submodule(self.prefix + path, module)


class Pad:
    """A hook after an embedding: pads what it answers with zeros to ``size`` columns."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, module: nn.Module, arguments: tuple, y: Tensor) -> Tensor:
        return functional.pad(y, (0, self.size - y.shape[-1]))


def _narrow(module: nn.Module, width: int, transposed: bool) -> None:
    """Gives a linear layer ``width`` inputs; its numbers are gone."""
    weight = module.weight
    shape = (width, weight.shape[1]) if transposed else (weight.shape[0], width)
    module.weight = nn.Parameter(weight.new_empty(shape))
    if transposed:
        module.nx = width
    else:
        module.in_features = width


def _narrow_table(module: nn.Module, width: int) -> None:
    """Gives an embedding ``width`` columns; its numbers are gone."""
    module.weight = nn.Parameter(module.weight.new_empty(module.weight.shape[0], width))
    module.embedding_dim = width
