"""Families whose four projections are nn.Linear modules of their own (weight [out, in])."""

from __future__ import annotations

from abc import abstractmethod

from gaugekit.models.family import Family, Read, bias_or_zeros, join, split
from gaugekit.models.view import AttentionView, Compact, Projection, Stored


class Linears(Family):
    """Reads and stores q, k, v and o, each under its own path."""

    @abstractmethod
    def heads(self, config: dict, part: str) -> int:
        """How many heads stand side by side in a part: H for q and o, G for k and v."""

    @abstractmethod
    def biased(self, config: dict, part: str) -> bool:
        """Whether a part has a bias."""

    def parts(self, config: dict, layer: int, read: Read) -> dict[str, Projection]:
        """The four projections of a layer, float64."""
        tensors, parts = self.take(config, layer, read), {}
        for part, path in self.projections(config, layer).items():
            weight, bias = tensors[f"{path}.weight"].mT, tensors.get(f"{path}.bias")
            count = self.heads(config, part)
            if part == "o":
                parts[part] = Projection(weight.unflatten(0, (count, -1)), bias)
            else:
                bias = None if bias is None else bias.unflatten(0, (count, -1))
                parts[part] = Projection(split(weight, count), bias)
        return parts

    def store(
        self, config: dict, layer: int, view: AttentionView, compact: dict[str, Compact] | None = None
    ) -> Stored:
        tensors, modules = {}, {}
        places = self.modules(config, layer)
        for part, path in self.projections(config, layer).items():
            if compact and part in compact:
                tensors |= {f"{path}.{name}": tensor for name, tensor in compact[part].tensors.items()}
                modules[places[part]] = compact[part].spec
                continue
            projection = getattr(view, part)
            weight = projection.weight.flatten(0, 1) if part == "o" else join(projection.weight)
            tensors[f"{path}.weight"] = weight.mT.contiguous()
            if self.biased(config, part):
                tensors[f"{path}.bias"] = bias_or_zeros(projection.bias, weight.shape[1])
        return Stored(tensors, modules)
