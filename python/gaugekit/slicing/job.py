"""The work of a slicing, unit by unit: both ends of the model, one layer, or one tensor that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.checkpoint.version import VERSION
from gaugekit.hf.sliced import Sliced
from gaugekit.models import Stream
from gaugekit.models.stream_view import heads_apart
from gaugekit.rewrite import Step
from gaugekit.rewrite.job import Job, Unit
from gaugekit.slicing import weights
from gaugekit.slicing.gauges import Frame


@dataclass
class Slices(Step):
    """A slicing, its bases known: ``frames`` are files, one a junction and one for the end of the stream; ``removed``
    the stored numbers that go by group; ``kept`` the share of the stream's energy that each sliced basis holds;
    ``details`` what a report says of it beside.
    """

    sliced: Sliced
    frames: list[Path]
    removed: dict[str, int]
    kept: list[float]
    details: dict[str, Any] = field(default_factory=dict)
    name: str = "slice"
    claim: str = "approximate"

    @property
    def arguments(self) -> dict[str, Any]:
        return self.details

    def plan(self, config: dict) -> dict[str, int]:
        """``removed``: of the checkpoint it was found for."""
        return self.removed

    def frame(self, place: int) -> Frame:
        """That of junction ``place``, counted through the model; the last is the end of the stream."""
        return Frame(**torch.load(self.frames[place], weights_only=True))


class SlicedJob(Job):
    """What ``Job`` is for rewrites of the attention, for a slicing of the whole stream."""

    def __init__(self, checkpoint: Checkpoint, dense: bool, dtype: torch.dtype | None):
        super().__init__(checkpoint, dense, dtype)
        self.stream: Stream = self.layers.family.stream()
        names, prefix = set(checkpoint.names()), self.layers.prefix
        if self.stream.tied and heads_apart(self.stream, prefix, names, checkpoint.read):
            raise ValueError(
                f"checkpoint: expected no {self.stream.head}.weight of its own beside tie_word_embeddings, got one"
            )
        weights.check_shifts(
            self.stream, lambda name: self._read(prefix + name) if prefix + name in names else None
        )

    def _units(self) -> list[Unit]:
        checkpoint, family, prefix = self.checkpoint, self.layers.family, self.layers.prefix
        stream = family.stream()
        ends = {prefix + f"{path}." for path in (stream.tokens, stream.positions, stream.norm) if path}
        ends.add(f"{stream.head}.")
        blocks = [prefix + family.block(layer) + "." for layer in range(family.layers)]
        rest = [name for name in checkpoint.names() if not family.recomputed(name)]
        of_ends = [name for name in rest if name.rpartition(".")[0] + "." in ends]
        units = [Unit(of_ends)]
        taken = set(of_ends)
        for layer, block in enumerate(blocks):
            units.append(Unit([name for name in rest if name.startswith(block)], layer))
            taken.update(units[-1].names)
        alone = [Unit([name]) for name in checkpoint.names() if name not in taken]
        return [*alone, *units]

    def statistics(self, calibration: Any, folder: Path) -> None:
        """None: what a slicing asks of a text is in its frames."""

    def run(self, unit: Unit, statistics: Any) -> tuple[dict[str, Tensor], dict]:
        step: Slices = self.rewrites[0]
        if unit.layer is None and not self._is_ends(unit):
            return self._rounded(unit, {name: self.checkpoint.read(name) for name in unit.names}, {})
        tensors = self.sliced_tensors(unit, self._read, step.frame, step.sliced)
        record: dict[str, Any] = {"invariance_error": None}
        if unit.layer is not None:
            first, count = self._places(unit.layer)
            record |= {"layer": unit.layer, "notes": {"kept": step.kept[first : first + count]}}
        return self._rounded(unit, tensors, record)

    def sliced_tensors(
        self,
        unit: Unit,
        read: Callable[[str], Tensor],
        frame: Callable[[int], Frame],
        sliced: Sliced,
    ) -> dict[str, Tensor]:
        """The tensors of a layer or of the ends, by their stored names, from ``read(stored name)``, float64 or meta."""
        used: set[str] = set()
        prefix, known = self.layers.prefix, set(unit.names)

        def part(name: str, before: str = prefix) -> Tensor | None:
            used.add(before + name)
            return read(before + name) if before + name in known else None

        if unit.layer is None:
            tensors = self._ends(part, frame, sliced)
        else:
            tensors, (first, _) = {}, self._places(unit.layer)
            for place, junction in enumerate(self.stream.junctions[unit.layer], first):
                parts = weights.junction(
                    junction, self.stream, part, frame(place), frame(place + 1), sliced.width
                )
                tensors |= {prefix + name: tensor for name, tensor in parts.items()}
        return {name: read(name) for name in unit.names if name not in used} | tensors

    def _ends(self, part, frame: Callable[[int], Frame], sliced: Sliced) -> dict[str, Tensor]:
        stream, prefix = self.stream, self.layers.prefix
        sums = weights.embeddings(stream, part, frame(0))
        tensors = {prefix + name: tensor for name, tensor in sums.items()}
        if stream.tied:
            table = f"{stream.tokens}.weight"
            tensors[prefix + table] = part(table)
        if sliced.head:
            weight = part(f"{stream.head}.weight", "")
            if weight is not None or stream.tied:
                bias = part(f"{stream.head}.bias", "")
                turned = weights.head(stream, part, frame(stream.places), weight, bias)
                tensors |= {f"{stream.head}.{name}": tensor for name, tensor in turned.items()}
            for name in ("weight", "bias"):
                part(f"{stream.norm}.{name}")  # they stand in the head now
        return tensors

    def _read(self, name: str) -> Tensor:
        tensor = self.checkpoint.read(name)
        if not tensor.is_floating_point():
            return tensor
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        return tensor.double()

    def _is_ends(self, unit: Unit) -> bool:
        return f"{self.layers.prefix}{self.stream.tokens}.weight" in unit.names

    def _places(self, layer: int) -> tuple[int, int]:
        """The first of a layer's junctions, counted through the model, and how many it has."""
        junctions = self.stream.junctions
        return sum(map(len, junctions[:layer])), len(junctions[layer])

    def numbers(self, sliced: Sliced) -> int:
        """The floating-point numbers that are stored of the sliced model, its inner shortcuts not counted."""
        total = 0
        size, places = self.stream.size, self.stream.places
        meta = {"device": "meta", "dtype": torch.float64}

        def frame(place: int) -> Frame:
            if place == places and not sliced.head:
                return Frame(
                    torch.empty(size, size, **meta), {"matrix": torch.empty(sliced.width, size, **meta)}
                )
            return Frame(torch.empty(size, sliced.width, **meta), {})

        for unit in self.units:
            if unit.layer is None and not self._is_ends(unit):
                tensors = {name: self._outline(name) for name in unit.names}
            else:
                tensors = self.sliced_tensors(unit, self._outline, frame, sliced)
            total += self._parameters({name: (t.shape, t.dtype) for name, t in tensors.items()})
        return total

    def _outline(self, name: str) -> Tensor:
        return torch.empty(self.checkpoint.shape(name), dtype=self.checkpoint.dtype(name), device="meta")

    def neurons(self, layer: int) -> int:
        """The hidden units of a layer's MLP: the inputs of the last module that writes to the stream."""
        writer = self.stream.junctions[layer][-1].writers[-1]
        shape = self.checkpoint.shape(f"{self.layers.prefix}{writer}.weight")
        return shape[0 if self.stream.transposed else 1]

    def stored_numbers(self) -> int:
        """The floating-point numbers of the source."""
        shapes = {
            name: (self.checkpoint.shape(name), self.checkpoint.dtype(name))
            for name in self.checkpoint.names()
        }
        return self._parameters(shapes)

    def result_bytes(self, removed: int) -> int:
        kinds = [self.checkpoint.dtype(name) for name in self.checkpoint.names()]
        width = max(dtype.itemsize for dtype in kinds if dtype.is_floating_point)
        width = width if self.dtype is None else self.dtype.itemsize
        others = sum(self.checkpoint.bytes(name) for name, dtype in zip(self.checkpoint.names(), kinds, strict=True)
                     if not dtype.is_floating_point)  # fmt: skip
        return (self.stored_numbers() - removed) * width + others

    def config(self, records: list[dict]) -> dict:
        config = self._plain_config()
        for name in self.stream.dropouts:
            # The way past a layer runs through that layer's answer now: what drops the answer would drop it too.
            config[name] = 0.0
        step: Slices = self.rewrites[0]
        config["quantization_config"] = {
            "quant_method": "gaugekit",
            "version": VERSION,
            "modules": {},
            "sliced": step.sliced.to_dict(),
        }
        return config
