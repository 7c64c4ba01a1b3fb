"""Models of several parts that each have layers of a kind of their own: two towers, an encoder and a decoder."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

from gaugekit.models.family import Family, Read
from gaugekit.models.view import AttentionView, Compact, Cut, Stored


@dataclass(frozen=True)
class Place:
    """Where a layer of the whole stands: layer ``layer`` of ``part``, whose names begin with ``path``."""

    path: str
    part: Family
    layer: int


class Compound(Family):
    """Layers of several adapters in one order. A family says ``places`` and ``anchor``, and why it is ``divided``.

    Parts are adapters of their own, bound to what the config says of them; they call their tensors as this one does,
    without the ``path`` of their place.
    """

    @abstractmethod
    def places(self) -> list[Place]:
        """The layers of all parts, in order."""

    @cached_property
    def _places(self) -> list[Place]:
        return self.places()

    def check(self) -> None:
        for part in {id(place.part): place.part for place in self._places}.values():
            part.check()

    @property
    def layers(self) -> int:
        return len(self._places)

    def block(self, layer: int) -> str:
        place = self._places[layer]
        return place.path + place.part.block(place.layer)

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        place = self._places[layer]
        return {place.path + name: shape for name, shape in place.part.shapes(place.layer).items()}

    def projections(self, layer: int) -> dict[str, str]:
        place = self._places[layer]
        return {part: place.path + path for part, path in place.part.projections(place.layer).items()}

    def modules(self, layer: int) -> dict[str, str]:
        place = self._places[layer]
        return {part: place.path + path for part, path in place.part.modules(place.layer).items()}

    def cuts(self, layer: int) -> dict[str, Cut]:
        place = self._places[layer]
        cuts = place.part.cuts(place.layer)
        return {part: replace(cut, path=place.path + cut.path) for part, cut in cuts.items()}

    def attention(self, layer: int, read: Read) -> AttentionView:
        place = self._places[layer]
        return place.part.attention(place.layer, lambda name: read(place.path + name))

    def store(self, layer: int, view: AttentionView, compact: dict[str, Compact] | None = None) -> Stored:
        place = self._places[layer]
        stored = place.part.store(place.layer, view, compact)
        return Stored(
            {place.path + name: tensor for name, tensor in stored.tensors.items()},
            {place.path + path: spec for path, spec in stored.modules.items()},
        )
