"""ViT, DeiT and DINOv2: separate nn.Linear projections, no mask; named in files otherwise than in memory."""

from __future__ import annotations

from collections.abc import Iterable

from gaugekit.models.family import Family, Read
from gaugekit.models.linears import Linears
from gaugekit.models.view import AttentionView

NAMES = ("vit", "deit", "dinov2", "dinov2_with_registers")
IN_FILES = {
    "q": "attention.query",
    "k": "attention.key",
    "v": "attention.value",
    "o": "output.dense",
}
LIVE = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


class Vit(Linears):
    """Encoders of images of the model types in ``NAMES``.

    transformers renames their tensors when it reads and writes files: "encoder.layer.0.attention.attention.query" of a
    file is "layers.0.attention.q_proj" of a model ("encoder.layer.0..." of DINOv2's). ``live`` adapters go by the
    second kind of name.
    """

    names = NAMES

    def __init__(self, config: dict, live: bool = False):
        super().__init__(config)
        self.live = live

    @property
    def anchor(self) -> str:
        return f"{self.block(0)}.attention.{(LIVE if self.live else IN_FILES)['o']}.weight"

    def named(self, names: Iterable[str]) -> Family:
        other = Vit(self.config, not self.live)
        return other if any(name.endswith(other.anchor) for name in names) else self

    def check(self) -> None:
        size, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        if not self.config.get("head_dim") and size % heads:
            raise ValueError(f"hidden_size: expected a multiple of num_attention_heads={heads}, got {size}")
        self.refuse_odd_heads()

    def block(self, layer: int) -> str:
        renamed = self.live and not self.name.startswith("dinov2")
        return f"layers.{layer}" if renamed else f"encoder.layer.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        return {
            part: f"{self.block(layer)}.attention.{path}"
            for part, path in (LIVE if self.live else IN_FILES).items()
        }

    def modules(self, layer: int) -> dict[str, str]:
        return Vit(self.config, live=True).projections(layer)

    def biased(self, part: str) -> bool:
        return part == "o" or bool(self.config.get("qkv_bias", True))

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(**self.parts(layer, read), scale=self.head_width**-0.5)
