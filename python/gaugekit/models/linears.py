"""Families whose four projections are nn.Linear modules of their own (weight [out, in])."""

from __future__ import annotations

from abc import abstractmethod

from gaugekit.models.family import Family, Read, bias_or_zeros, join, split
from gaugekit.models.view import AttentionView, Compact, Projection, Stored


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

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for part, path in self.projections(layer).items():
            inner = self.heads(part) * self.head_width
            outputs, inputs = (self.size, inner) if part == "o" else (inner, self.size)
            shapes[f"{path}.weight"] = (outputs, inputs)
            if self.biased(part):
                shapes[f"{path}.bias"] = (outputs,)
        return shapes

    def parts(self, layer: int, read: Read) -> dict[str, Projection]:
        """The four projections of a layer, float64."""
        tensors, parts = self.take(layer, read), {}
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
        tensors, modules = {}, {}
        places = self.modules(layer)
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
