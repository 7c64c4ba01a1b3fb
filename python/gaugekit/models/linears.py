"""Families whose four projections are nn.Linear modules of their own (weight [out, in])."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gaugekit.models.family import Family, Read, bias_or_zeros, join, split
from gaugekit.models.view import AttentionView, Compact, Cut, Norms, Projection, Stored


@dataclass(frozen=True)
class NormLayout:
    """Where a family keeps the gains of its norms of queries and keys: {"q", "k": {tensor: shape}}, in the order of the
    heads; the rest as ``Norms`` has it.
    """

    shapes: dict[str, dict[str, tuple[int, ...]]]
    eps: float
    offset: float = 0.0
    centred: bool = False
    whole: bool = False

    def read(self, tensors: dict[str, Tensor], width: int) -> Norms:
        """The norms, from float64 ``tensors`` by name; ``width`` is K."""
        gains = {
            part: torch.cat([tensors[name].flatten() for name in names]).view(-1, width)
            for part, names in self.shapes.items()
        }
        return Norms(gains["q"], gains["k"], self.eps, self.offset, self.centred, self.whole)

    def store(self, norms: Norms) -> dict[str, Tensor]:
        """The inverse of ``read``."""
        tensors = {}
        for part, shapes in self.shapes.items():
            sizes = [torch.Size(shape).numel() for shape in shapes.values()]
            for (name, shape), piece in zip(
                shapes.items(), getattr(norms, part).flatten().split(sizes), strict=True
            ):
                tensors[name] = piece.view(shape).contiguous()
        return tensors


class Linears(Family):
    """Reads and stores q, k, v and o, each under its own path.

    A family says ``check``, ``block``, ``projections``, ``biased`` and ``attention``, and overrides what its config
    names otherwise: ``layers``, ``size``, ``head_width``, ``heads``.
    """

    @property
    def size(self) -> int:
        """D, the model's width."""
        return self.config["hidden_size"]

    @property
    def head_width(self) -> int:
        """K, the width of a head."""
        return self.config.get("head_dim") or self.size // self.heads("q")

    def heads(self, part: str) -> int:
        """How many heads stand side by side in a part: H for q and o, G for k and v."""
        return self.config["num_attention_heads"]

    @abstractmethod
    def biased(self, part: str) -> bool:
        """Whether a part has a bias."""

    def norms(self, layer: int) -> NormLayout | None:
        """The norms of queries and keys, where they have any of a kind that ``Norms`` describes."""
        return None

    def cuts(self, layer: int) -> dict[str, Cut]:
        paths = self.projections(layer)
        return {part: Cut(paths[part], self.heads(part), self.head_width) for part in "qkv"}

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for part, path in self.projections(layer).items():
            inner = self.heads(part) * self.head_width
            outputs, inputs = (self.size, inner) if part == "o" else (inner, self.size)
            shapes[f"{path}.weight"] = (outputs, inputs)
            if self.biased(part):
                shapes[f"{path}.bias"] = (outputs,)
        if (norms := self.norms(layer)) is not None:
            shapes |= norms.shapes["q"] | norms.shapes["k"]
        return shapes

    def parts(self, layer: int, read: Read) -> dict[str, Any]:
        """The four projections of a layer, float64, and its "norms" where it has any."""
        tensors, parts = self.take(layer, read), {}
        if (norms := self.norms(layer)) is not None:
            parts["norms"] = norms.read(tensors, self.head_width)
        for part, path in self.projections(layer).items():
            weight, bias = tensors[f"{path}.weight"].mT, tensors.get(f"{path}.bias")
            count = self.heads(part)
            if part == "o":
                parts[part] = Projection(weight.unflatten(0, (count, -1)), bias)
            else:
                bias = None if bias is None else bias.unflatten(0, (count, -1))
                parts[part] = Projection(split(weight, count), bias)
        return parts

    def store(self, layer: int, view: AttentionView, compact: dict[str, Compact] | None = None) -> Stored:
        norms = self.norms(layer)
        tensors = {} if norms is None else norms.store(view.norms)
        modules, places = {}, self.modules(layer)
        for part, path in self.projections(layer).items():
            if compact and part in compact:
                tensors |= {f"{path}.{name}": tensor for name, tensor in compact[part].tensors.items()}
                modules[places[part]] = compact[part].spec
                continue
            projection = getattr(view, part)
            weight = projection.weight.flatten(0, 1) if part == "o" else join(projection.weight)
            tensors[f"{path}.weight"] = weight.mT.contiguous()
            if self.biased(part):
                tensors[f"{path}.bias"] = bias_or_zeros(projection.bias, weight.shape[1])
        return Stored(tensors, modules)
