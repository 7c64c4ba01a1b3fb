"""One adapter a family: how BERT, GPT-2, ... name and store the parts of their attention."""

from __future__ import annotations

from torch import Tensor, nn

from .bert import Bert
from .family import Family
from .gpt2 import Gpt2
from .view import AttentionView, Compact, Projection, Stored, free_rows, parameters

FAMILIES: dict[str, Family] = {adapter.name: adapter for adapter in (Bert(), Gpt2())}


def family(config: dict) -> Family:
    """The adapter for ``config`` (the content of ``config.json``).

    Raises ValueError for a family that is not known (naming those that are) and for a config of a known family that the
    mathematics does not cover (naming the entry).
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(sorted(FAMILIES))}; got {kind!r}")
    adapter = FAMILIES[kind]
    try:
        adapter.check(config)
    except KeyError as missing:
        raise ValueError(f"config of a {kind} model: expected an entry {missing}, got none") from None
    return adapter


class Live:
    """A live model read as if it were a checkpoint: ``config``, ``family``, ``prefix``, ``attention(layer)``.

    ``model`` is an nn.Module with a ``config`` (transformers' models have one). Raises ValueError where it has none, or
    where its family is not known.
    """

    def __init__(self, model: nn.Module):
        config = getattr(model, "config", None)
        if not hasattr(config, "to_dict"):
            raise ValueError(
                f"model: expected a transformers model (with a config), got {type(model).__name__}"
            )
        self.model = model
        self.config = config.to_dict()
        self.family = family(self.config)
        self.prefix = self.family.prefix(name for name, _ in model.named_parameters())

    @property
    def layers(self) -> int:
        """L, the number of layers."""
        return self.family.layers(self.config)

    def read(self, name: str) -> Tensor:
        """The parameter ``name`` (without prefix), detached, on the CPU."""
        module, _, leaf = (self.prefix + name).rpartition(".")
        tensor = getattr(self.model.get_submodule(module), leaf, None)
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"model: expected a dense parameter {self.prefix + name}, got none (already compact?)"
            )
        return tensor.detach().cpu()

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Copies ``tensors`` into the parameters of those names (without prefix), rounded to their dtype."""
        for name, tensor in tensors.items():
            self.model.get_parameter(self.prefix + name).data.copy_(tensor)

    def attention(self, layer: int) -> AttentionView:
        """The float64 view of one layer's attention."""
        return self.family.attention(self.config, layer, self.read)


__all__ = [
    "FAMILIES",
    "AttentionView",
    "Compact",
    "Family",
    "Live",
    "Projection",
    "Stored",
    "family",
    "free_rows",
    "parameters",
]
