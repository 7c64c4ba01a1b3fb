"""What an adapter has to say about its family; nothing else in the house knows a family's names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.models.stream import Stream
from gaugekit.models.view import AttentionView, Compact, Cut, Projection, Stored

Read = Callable[[str], Tensor]


class Family(ABC):
    """One model of an architecture: where the parts of its attention are, and how they are laid out.

    It is bound to ``config``, the content of ``config.json``; making one reads nothing of it, ``check`` does. Names are
    those of the base model, without the prefix ("bert.", "transformer.", ...) a model with a head puts before them;
    ``prefix`` finds it.
    """

    names: tuple[str, ...]  # the model types it is the adapter of
    anchor: str  # a tensor every checkpoint of the family has, at layer 0
    once = True  # whether a model runs each layer once
    unsliced: str | None = None  # why the streams that there are cannot be sliced

    def __init__(self, config: dict):
        self.config = config

    @property
    def name(self) -> str:
        """The model type."""
        return self.config["model_type"]

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError, with the reason, for a config the mathematics of this house does not cover."""

    @property
    def layers(self) -> int:
        """L, the number of attentions that have weights of their own: one that a model runs several times counts once,
        a block with self-attention and cross-attention is two layers.
        """
        return self.config["num_hidden_layers"]

    @property
    def divided(self) -> str | None:
        """Why not all layers read one sequence of tokens; None where they do."""
        return None

    @property
    def unstreamed(self) -> str | None:
        """Why a calibration cannot run the blocks of layers 0 to L − 1 one after the other, each once, with what the
        first was given beside the hidden states; None where it can.
        """
        return self.divided

    @abstractmethod
    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer's attention, by name, with their shapes."""

    @abstractmethod
    def attention(self, layer: int, read: Read) -> AttentionView:
        """One layer's attention in float64 from ``read(name)``; meta tensors where ``read`` gives meta tensors."""

    @abstractmethod
    def store(self, layer: int, view: AttentionView, compact: dict[str, Compact] | None = None) -> Stored:
        """The inverse of ``attention``: float64 tensors under the family's names.

        Parts named in ``compact`` ("q", "k", "v", "o") are stored by their form instead. An absent bias is stored as
        zeros where the family always has one.
        """

    @abstractmethod
    def projections(self, layer: int) -> dict[str, str]:
        """{"q", "k", "v", "o": path of the module that computes it}; fused parts share a path."""

    @abstractmethod
    def block(self, layer: int) -> str:
        """The path of the block that layer ``layer`` stands in."""

    def cuts(self, layer: int) -> dict[str, Cut]:
        """{"q", "k", "v": where a live model holds its weights}; ValueError, with the reason, where they cannot be cut
        out of the module they stand in.
        """
        raise ValueError(f"the projections of {self.name!r} models cannot be cut into parts yet")

    def dropout(self, layer: int) -> str | None:
        """The path of the nn.Dropout that the output of a layer's attention goes through inside of the attention."""
        return None

    def stream(self) -> Stream:
        """The residual stream of the model, where slicing can cut it; ValueError, with the reason, where not."""
        raise ValueError(
            self.unsliced or f"model_type: the residual stream of {self.name!r} models has no view yet"
        )

    def streams(self) -> tuple[Stream, ...]:
        """All residual streams of the model, for the groups that act on them; ValueError as ``stream``'s without any.

        Streams share no tensor: two that begin in one table are one.
        """
        return (self.stream(),)

    def entry(self, *names: str) -> Any:
        """The first entry of the config called so that is not null; KeyError, with the first name, without one."""
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        raise KeyError(names[0])

    def refuse_odd_heads(self) -> None:
        """ValueError for cross-attention beside the self-attention, and for heads that were cut out of some layers."""
        if self.config.get("add_cross_attention"):
            raise ValueError("add_cross_attention: expected false, got true (cross-attention is not covered)")
        if self.config.get("pruned_heads"):
            raise ValueError(f"pruned_heads: expected none, got {self.config['pruned_heads']}")

    def refuse_short(self, entry: str) -> None:
        """ValueError for a list with an entry a layer that is shorter than there are layers."""
        listed = self.config.get(entry)
        if listed is not None and len(listed) < self.layers:
            raise ValueError(
                f"{entry}: expected one entry for each of {self.layers} layers, got {len(listed)}"
            )

    def named(self, names: Iterable[str]) -> Family:
        """The adapter that goes by ``names``: a family may call its tensors otherwise in files than in memory, or a
        model have only a part of what its config describes.
        """
        return self

    def modules(self, layer: int) -> dict[str, str]:
        """``projections`` of a live model, whatever names this adapter goes by: where forms are put."""
        return self.projections(layer)

    def inside(self, modules: dict[str, dict]) -> dict[str, dict[str, dict]]:
        """{entry of the config: those of ``modules`` that stand in the part it describes, by the part's own names}, for
        parts that can be loaded out of a whole model.
        """
        return {}

    def recomputed(self, name: str) -> bool:
        """Whether a stored tensor is no parameter: old files hold masks that the model makes anew."""
        return False

    def prefix(self, names: Iterable[str]) -> str:
        """What stands before the base model's names in ``names``; ValueError unless the model is found once."""
        prefixes = sorted({name[: -len(self.anchor)] for name in names if _ends(name, self.anchor)})
        if len(prefixes) != 1:
            what = f"several models, at {prefixes}" if prefixes else "none"
            raise ValueError(f"expected one {self.name} model (a tensor named {self.anchor!r}), got {what}")
        return prefixes[0]

    def outline(self, layer: int) -> AttentionView:
        """The view of a layer with shapes but no numbers (meta device), from the config alone."""
        shapes = self.shapes(layer)
        return self.attention(layer, lambda name: torch.empty(shapes[name], device="meta"))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The block of each of the L layers of a live model."""
        prefix = self.prefix(name for name, _ in model.named_parameters())
        return [model.get_submodule(prefix + self.block(layer)) for layer in range(self.layers)]

    def take(self, layer: int, read: Read) -> dict[str, Tensor]:
        """The tensors of ``shapes`` in float64; ValueError for another shape than the config says, 8 bits, or NaN."""
        tensors = {}
        for name, shape in self.shapes(layer).items():
            tensor = read(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape} by the config, got {tuple(tensor.shape)}")
            if not tensor.is_floating_point():
                raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
            if tensor.dtype.itemsize == 1:  # such numbers come with scales that stand elsewhere
                raise ValueError(f"{name}: expected numbers of 16 bits or more, got {tensor.dtype}")
            tensors[name] = tensor.detach().to(torch.float64, copy=True)
            if not (tensor.is_meta or tensors[name].isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        return tensors


def _ends(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith("." + anchor)


def split(weight: Tensor, heads: int) -> Tensor:
    """[D, heads·width] -> [heads, D, width]."""
    return weight.unflatten(1, (heads, -1)).movedim(1, 0)


def join(weight: Tensor) -> Tensor:
    """[heads, D, width] -> [D, heads·width], the inverse of ``split``."""
    return weight.movedim(0, 1).flatten(1)


def bias_or_zeros(part_bias: Tensor | None, size: int) -> Tensor:
    """A bias as one row, zeros where there is none."""
    return torch.zeros(size, dtype=torch.float64) if part_bias is None else part_bias.flatten()


def linear(projection: Projection) -> Compact:
    """A q, k or v projection as the form "linear": where a family would store zeros for a bias that is gone."""
    weight = join(projection.weight).mT.contiguous()
    arguments = {"inputs": weight.shape[1], "outputs": weight.shape[0], "bias": projection.bias is not None}
    tensors = {"weight": weight}
    if projection.bias is not None:
        tensors["bias"] = projection.bias.flatten()
    return Compact("linear", arguments, tensors)
