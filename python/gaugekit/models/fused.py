"""Families in which one module computes queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from gaugekit.models.family import Read, bias_or_zeros, join, linear, split
from gaugekit.models.linears import Linears
from gaugekit.models.view import AttentionView, Compact, Cut, Projection, Stored


class Fused(Linears):
    """Reads and stores q, k and v, which share the path that ``projections`` gives them, and o.

    The outputs of the shared module are all queries, all keys, all values; or, with ``groups``, the queries, the key
    and the value of one key/value head after another. A family says what ``Linears`` asks for; q, k and v are biased
    together or not at all.
    """

    transposed = False  # whether weights are stored [in, out], as Conv1D has them

    @property
    def groups(self) -> int:
        """G where queries, key and value of each key/value head stand together, else 1."""
        return 1

    def cuts(self, layer: int) -> dict[str, Cut]:
        if self.groups != 1:
            raise ValueError("queries, keys and values stand together head by head in one projection")
        cuts, start = {}, 0
        for part in "qkv":
            cuts[part] = Cut(
                self.projections(layer)[part], self.heads(part), self.head_width, start, self.transposed
            )
            start += self.heads(part) * self.head_width
        return cuts

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        inner = {part: self.heads(part) * self.head_width for part in "qkvo"}
        paths, shapes = self.projections(layer), {}
        for part, outputs, inputs in (
            ("q", inner["q"] + inner["k"] + inner["v"], self.size),
            ("o", self.size, inner["o"]),
        ):
            weight: tuple[int, ...] = (inputs, outputs) if self.transposed else (outputs, inputs)
            shapes[f"{paths[part]}.weight"] = weight
            if self.biased(part):
                shapes[f"{paths[part]}.bias"] = (outputs,)
        return shapes

    def parts(self, layer: int, read: Read) -> dict[str, Projection]:
        tensors, paths, parts = self.take(layer, read), self.projections(layer), {}
        weights = self._apart(self._oriented(tensors[f"{paths['q']}.weight"]))
        bias = tensors.get(f"{paths['q']}.bias")
        biases = [None] * 3 if bias is None else [row[0] for row in self._apart(bias[None])]
        for part, weight, row in zip("qkv", weights, biases, strict=True):
            count = self.heads(part)
            parts[part] = Projection(
                split(weight, count), None if row is None else row.unflatten(0, (count, -1))
            )
        out = self._oriented(tensors[f"{paths['o']}.weight"])
        parts["o"] = Projection(out.unflatten(0, (self.heads("o"), -1)), tensors.get(f"{paths['o']}.bias"))
        return parts

    def store(self, layer: int, view: AttentionView, compact: dict[str, Compact] | None = None) -> Stored:
        compact = compact or {}
        paths, places = self.projections(layer), self.modules(layer)
        tensors: dict[str, Tensor] = {}
        modules: dict[str, dict] = {}
        fused = {part: getattr(view, part) for part in "qkv"}
        if any(part in compact for part in fused):
            # The three are no longer of one kind: a concatenation of forms, its parts under 0, 1, 2.
            forms = [compact.get(part) or linear(projection) for part, projection in fused.items()]
            for index, form in enumerate(forms):
                tensors |= {f"{paths['q']}.{index}.{name}": tensor for name, tensor in form.tensors.items()}
            arguments: dict = {"parts": [form.spec for form in forms]}
            modules[places["q"]] = {
                "form": "concat",
                "arguments": arguments if self.groups == 1 else arguments | {"groups": self.groups},
            }
        else:
            weights = [join(projection.weight) for projection in fused.values()]
            tensors[f"{paths['q']}.weight"] = self._oriented(self._together(weights)).contiguous()
            if self.biased("q"):
                rows = [
                    bias_or_zeros(projection.bias, weight.shape[1])[None]
                    for projection, weight in zip(fused.values(), weights, strict=True)
                ]
                tensors[f"{paths['q']}.bias"] = self._together(rows)[0]
        if "o" in compact:
            tensors |= {f"{paths['o']}.{name}": tensor for name, tensor in compact["o"].tensors.items()}
            modules[places["o"]] = compact["o"].spec
        else:
            tensors[f"{paths['o']}.weight"] = self._oriented(view.o.weight.flatten(0, 1)).contiguous()
            if self.biased("o"):
                tensors[f"{paths['o']}.bias"] = bias_or_zeros(view.o.bias, self.size)
        return Stored(tensors, modules)

    def _oriented(self, weight: Tensor) -> Tensor:
        """As it is stored -> [in, out], and back."""
        return weight if self.transposed else weight.mT

    def _apart(self, fused: Tensor) -> list[Tensor]:
        """[n, outputs] -> the queries', keys' and values' outputs, each [n, heads·width]."""
        widths = [self.heads(part) * self.head_width // self.groups for part in "qkv"]
        return [part.flatten(1) for part in fused.unflatten(1, (self.groups, -1)).split(widths, 2)]

    def _together(self, parts: list[Tensor]) -> Tensor:
        """The inverse of ``_apart``."""
        return torch.cat([part.unflatten(1, (self.groups, -1)) for part in parts], 2).flatten(1)


class HeadByHead(Fused):
    """Those that hold query, key and value of one head after another as query_key_value, beside dense.

    A family says which module of a block its attention is.
    """

    attention_name: str

    @property
    def groups(self) -> int:
        return self.heads("k")

    def projections(self, layer: int) -> dict[str, str]:
        path = f"{self.block(layer)}.{self.attention_name}"
        return {**dict.fromkeys("qkv", f"{path}.query_key_value"), "o": f"{path}.dense"}
