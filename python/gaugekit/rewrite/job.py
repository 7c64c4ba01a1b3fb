"""The work of a conversion, unit by unit: one layer's attention, or one other tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaugekit.checkpoint.compact import forms
from gaugekit.checkpoint.config import stored_as
from gaugekit.checkpoint.dtypes import name_of
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.checkpoint.version import VERSION
from gaugekit.models import Layers, Stored, rounded
from gaugekit.rewrite.rewrite import Calibration, Step, invariance_error


@dataclass(frozen=True)
class Unit:
    """A piece of work whose result is written whole: one layer's attention, or one other tensor."""

    names: list[str]
    layer: int | None = None


class Job:
    """What to do to each unit of a checkpoint; ``rewrites`` are set before the first is run."""

    def __init__(self, checkpoint: Checkpoint, dense: bool, dtype: torch.dtype | None):
        if (method := stored_as(checkpoint.config)) is not None:
            raise ValueError(
                f"source: expected plain weights, got a checkpoint stored as {method!r}; use the original"
            )
        self.checkpoint, self.dense, self.dtype = checkpoint, dense, dtype
        self.rewrites: list[Step] = []
        self.layers = Layers(checkpoint.config, checkpoint.names(), checkpoint.read)
        self.units = self._units()

    def _units(self) -> list[Unit]:
        """What is read and written at a time: what stands alone first, then the layers."""
        checkpoint, units, taken = self.checkpoint, [], set()
        for layer in range(len(self.layers)):
            shapes = self.layers.family.shapes(layer)
            unit = Unit([self.layers.prefix + name for name in shapes], layer)
            for name, shape in zip(unit.names, shapes.values(), strict=True):
                if checkpoint.shape(name) != shape:  # named in an error now, not after an hour
                    raise ValueError(
                        f"{name}: expected shape {shape} by the config, got {checkpoint.shape(name)}"
                    )
            units.append(unit)
            taken.update(unit.names)
        self._refuse_more(taken)
        rest = sorted(
            (name for name in checkpoint.names() if name not in taken), key=lambda n: (checkpoint.file(n), n)
        )
        return [*(Unit([name]) for name in rest), *units]

    def _refuse_more(self, taken: set[str]) -> None:
        """ValueError where a projection holds more than its family says (adapters, scales, biases that the config
        denies): what is rewritten would no longer fit it.
        """
        family, prefix = self.layers.family, self.layers.prefix
        paths = {
            prefix + path for layer in range(len(self.layers)) for path in family.projections(layer).values()
        }
        for name in self.checkpoint.names():
            above = itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}")
            if name not in taken and not paths.isdisjoint(above):
                raise ValueError(
                    f"source: expected no more than weights, and biases where the config has them, in its projections; "
                    f"got {name!r}"
                )

    def steps(self) -> list[dict[str, Any]]:
        """What the report says of each rewrite, from the config alone."""
        return [
            {
                "rewrite": rewrite.name,
                "claim": rewrite.claim,
                **rewrite.arguments,
                "removed": rewrite.plan(self.layers.config),
            }
            for rewrite in self.rewrites
        ]

    def statistics(self, calibration: Calibration | None, folder: Path) -> Sequence[dict] | None:
        """What the rewrites ask for, by layer; None where they ask for nothing."""
        modules = sorted({name for rewrite in self.rewrites for name in rewrite.needs_statistics})
        return calibration.collect(modules, folder) if modules else None

    def run(self, unit: Unit, statistics: Sequence[dict] | None) -> tuple[dict[str, Tensor], dict]:
        """The tensors to write for a unit, and its record: numbers stored before and after, the error of a layer."""
        record: dict[str, Any] = {}
        if unit.layer is None:
            tensors = {name: self.checkpoint.read(name) for name in unit.names}
        else:
            stored, record["invariance_error"], record["notes"] = self._attention(unit.layer, statistics)
            tensors = {self.layers.prefix + name: tensor for name, tensor in stored.tensors.items()}
            record |= {"layer": unit.layer, "modules": stored.modules}
        return self._rounded(unit, tensors, record)

    def _rounded(
        self, unit: Unit, tensors: dict[str, Tensor], record: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict]:
        """The tensors in the dtypes they are stored in, and the record with the numbers before and after."""
        source = {name: self.checkpoint.dtype(name) for name in unit.names}
        before = {name: (self.checkpoint.shape(name), dtype) for name, dtype in source.items()}
        written = {}
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                dtype = self.dtype or source.get(name) or next(iter(source.values()))
                tensor = rounded(name, tensor, dtype)
            written[name] = tensor.contiguous()
        after = {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()}
        counts = {"before": self._parameters(before), "after": self._parameters(after)}
        return written, {**record, **counts}

    def _attention(
        self, layer: int, statistics: Sequence[dict] | None
    ) -> tuple[Stored, float, dict[str, Any]]:
        before = after = self.layers.attention(layer)
        moments, notes = None if statistics is None else statistics[layer], {}
        for rewrite in self.rewrites:
            view, after = after, rewrite.layer(after, moments)
            notes |= rewrite.note(view, moments)
        compact = forms(after) if self.rewrites and not self.dense else {}
        stored = self.layers.family.store(layer, after, compact)
        return stored, invariance_error(before, after, seed=layer), notes

    def _parameters(self, tensors: dict[str, tuple[Sequence[int], torch.dtype]]) -> int:
        recomputed = self.layers.family.recomputed
        return sum(
            torch.Size(shape).numel()
            for name, (shape, dtype) in tensors.items()
            if dtype.is_floating_point and not recomputed(name)
        )

    def config(self, records: list[dict]) -> dict:
        """config.json of the result."""
        config = self._plain_config()
        modules = {name: spec for record in records for name, spec in record.get("modules", {}).items()}
        if modules:
            config["quantization_config"] = _compact(modules)
            for entry, part in self.layers.family.inside(modules).items():
                config[entry] = {**(config.get(entry) or {}), "quantization_config": _compact(part)}
        return config

    def _plain_config(self) -> dict:
        """The source's, with the dtype of the result."""
        config = dict(self.checkpoint.config)
        if self.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = name_of(self.dtype)
        return config

    def result_bytes(self, removed: int) -> int:
        """What the tensors of the result take at most: in the new dtype, without the ``removed`` numbers of compact
        parts, whose places cost four bytes a channel and rewrite.
        """
        size = 0
        for name in self.checkpoint.names():
            dtype = self.checkpoint.dtype(name)
            new = self.dtype if self.dtype is not None and dtype.is_floating_point else dtype
            size += torch.Size(self.checkpoint.shape(name)).numel() * new.itemsize
        if self.dense:
            return size
        layers = [unit.names for unit in self.units if unit.layer is not None]
        channels = sum(sum(self.checkpoint.shape(name)) for names in layers for name in names)
        smallest = min(self.checkpoint.dtype(name).itemsize for names in layers for name in names)
        width = smallest if self.dtype is None else self.dtype.itemsize
        return size - removed * width + 4 * channels * len(self.rewrites)


def _compact(modules: dict[str, dict]) -> dict[str, Any]:
    return {"quant_method": "gaugekit", "version": VERSION, "modules": modules}
