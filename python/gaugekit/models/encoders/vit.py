"""ViT and DeiT: separate nn.Linear projections (weight [out, in]), no mask; named in files otherwise than in memory."""

from __future__ import annotations

from collections.abc import Iterable

from gaugekit.models.family import Family, Read
from gaugekit.models.linears import Linears
from gaugekit.models.view import AttentionView

NAMES = ("vit", "deit")
IN_FILES = {
    "q": "attention.query",
    "k": "attention.key",
    "v": "attention.value",
    "o": "output.dense",
}
LIVE = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


class Vit(Linears):
    """Encoders of images, model_type "vit" and "deit".

    transformers renames their tensors when it reads and writes files: "encoder.layer.0.attention.attention.query" of a
    file is "layers.0.attention.q_proj" of a model. ``live`` adapters go by the second kind of name.
    """

    def __init__(self, name: str = "vit", live: bool = False):
        self.name, self.live = name, live
        self.anchor = f"{self.block(0)}.attention.{(LIVE if live else IN_FILES)['o']}.weight"

    def named(self, names: Iterable[str]) -> Family:
        other = Vit(self.name, not self.live)
        return other if any(name.endswith(other.anchor) for name in names) else self

    def check(self, config: dict) -> None:
        size, heads = config["hidden_size"], config["num_attention_heads"]
        if not config.get("head_dim") and size % heads:
            raise ValueError(f"hidden_size: expected a multiple of num_attention_heads={heads}, got {size}")
        if config.get("pruned_heads"):
            raise ValueError(f"pruned_heads: expected none, got {config['pruned_heads']}")

    def layers(self, config: dict) -> int:
        return config["num_hidden_layers"]

    def block(self, layer: int) -> str:
        return f"layers.{layer}" if self.live else f"encoder.layer.{layer}"

    def projections(self, config: dict, layer: int) -> dict[str, str]:
        return {
            part: f"{self.block(layer)}.attention.{path}"
            for part, path in (LIVE if self.live else IN_FILES).items()
        }

    def modules(self, config: dict, layer: int) -> dict[str, str]:
        return Vit(self.name, live=True).projections(config, layer)

    def shapes(self, config: dict, layer: int) -> dict[str, tuple[int, ...]]:
        size, inner = config["hidden_size"], config["num_attention_heads"] * self._width(config)
        shapes = {}
        for part, path in self.projections(config, layer).items():
            outputs, inputs = (size, inner) if part == "o" else (inner, size)
            shapes[f"{path}.weight"] = (outputs, inputs)
            if self.biased(config, part):
                shapes[f"{path}.bias"] = (outputs,)
        return shapes

    def heads(self, config: dict, part: str) -> int:
        return config["num_attention_heads"]

    def biased(self, config: dict, part: str) -> bool:
        return part == "o" or bool(config.get("qkv_bias", True))

    def attention(self, config: dict, layer: int, read: Read) -> AttentionView:
        return AttentionView(**self.parts(config, layer, read), scale=self._width(config) ** -0.5)

    @staticmethod
    def _width(config: dict) -> int:
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
