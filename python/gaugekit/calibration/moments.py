"""Second moments of what flows into a module, and ``observe``, which finds them for a live model.

``gaugekit.statistics.collect`` finds them for a checkpoint, one layer in memory at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gaugekit import models
from gaugekit.models.family import Family
from gaugekit.text.batches import tokens

PARTS = ("q", "k", "v", "o")


@dataclass
class Moments:
    """Of the rows x [D] that entered a module at real tokens: how many, Σ x [D] and Σ x xᵀ [D, D], float64."""

    count: int
    total: torch.Tensor
    products: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """E x [D]."""
        return self.total / self.count

    @property
    def second(self) -> torch.Tensor:
        """E x xᵀ [D, D]."""
        return self.products / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """E x xᵀ − E x E xᵀ [D, D]."""
        return self.second - torch.outer(self.mean, self.mean)


def digest(moments: Sequence[dict[str, Moments]]) -> str:
    """The SHA-256 of all numbers of all layers, in hexadecimal."""
    content = hashlib.sha256()
    for layer in moments:
        for name in sorted(layer):
            entry = layer[name]
            content.update(f"{name} {entry.count} {len(entry.total)}\n".encode())
            for sums in (entry.total, entry.products):
                content.update(sums.contiguous().numpy())
        content.update(b"\n")
    return content.hexdigest()


@torch.no_grad()
def observe(
    model: torch.nn.Module,
    text: str | Path | list[str],
    *,
    modules: Sequence[str] = ("q",),
    batch_size: int = 8,
) -> list[dict[str, Moments]]:
    """What ``collect`` gives, for a live model as it stands, by one run of it over the text.

    Memory beside the model: one batch and the moments. The text is read by the tokenizer in the directory the model was
    loaded from. Raises ValueError as ``collect`` does, and where there is no such directory.
    """
    live = models.Live(model)
    if (reason := live.family.divided) is not None:
        raise ValueError(f"model: expected one that reads one text, but {reason}")
    blocks = live.family.blocks(model)
    moments: list[dict[str, Moments]] = [{} for _ in blocks]
    real: list[torch.Tensor] = []

    def watch(layer: int, name: str):
        return lambda module, arguments: add(moments[layer], name, arguments[0][real[-1]].cpu())

    hooks = [
        module.register_forward_pre_hook(watch(layer, name))
        for layer, inside in enumerate(watched(model, blocks, live.family, list(modules)))
        for name, module in inside.items()
    ]
    try:
        for inputs in tokens(model, text, batch_size):
            real[:] = [inputs["attention_mask"].bool()]
            with evaluating(model):
                model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode; afterwards every module is in the mode it was in."""
    was = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was:
            module.training = True


def watched(
    model: torch.nn.Module, blocks: Iterable[torch.nn.Module], family: Family, modules: list[str]
) -> list[dict[str, torch.nn.Module]]:
    """{name: module} of each block, for "q", "k", "v", "o" and paths inside a block."""
    paths = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    prefix = family.prefix(name for name, _ in model.named_parameters())
    by_block = []
    for layer, block in enumerate(blocks):
        parts = family.projections(layer)
        inside = {
            name: (prefix + parts[name]).removeprefix(paths[block]) if name in PARTS else name
            for name in modules
        }
        known = dict(block.named_modules())
        for name, path in inside.items():
            if path not in known:
                raise ValueError(f"modules: expected q, k, v, o or a module of a block, got {name!r}")
        by_block.append({name: known[path] for name, path in inside.items()})
    return by_block


def add(moments: dict[str, Moments], name: str, rows: torch.Tensor) -> None:
    """Counts ``rows`` [N, D] into the moments of ``name``."""
    rows = rows.double()
    if name not in moments:
        size = rows.shape[1]
        zeros = torch.zeros(size, dtype=torch.float64)
        moments[name] = Moments(0, zeros, torch.zeros(size, size, dtype=torch.float64))
    moments[name].count += len(rows)
    moments[name].total += rows.sum(0)
    moments[name].products += rows.mT @ rows
