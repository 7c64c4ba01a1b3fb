"""T5's encoder: separate nn.Linear projections without biases under encoder.block.<l>.layer.0.SelfAttention."""

from __future__ import annotations

from gaugekit.models.family import Read
from gaugekit.models.linears import Linears
from gaugekit.models.view import POSITIONS, AttentionView

NAMES = ("t5", "mt5", "umt5")


class T5(Linears):
    """Self-attention of encoders of model_type "t5", "mt5" and "umt5"; a decoder beside them is left as it is."""

    names = NAMES
    anchor = "encoder.block.0.layer.0.SelfAttention.o.weight"

    def check(self) -> None:
        for entry in ("d_model", "d_kv", "num_heads", "num_layers"):
            if self.config[entry] < 1:
                raise ValueError(f"{entry}: expected a positive number, got {self.config[entry]}")

    @property
    def layers(self) -> int:
        return self.config["num_layers"]

    def block(self, layer: int) -> str:
        return f"encoder.block.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        return {part: f"{self.block(layer)}.layer.0.SelfAttention.{part}" for part in "qkvo"}

    @property
    def size(self) -> int:
        return self.config["d_model"]

    @property
    def head_width(self) -> int:
        return self.config["d_kv"]

    def heads(self, part: str) -> int:
        return self.config["num_heads"]

    def biased(self, part: str) -> bool:
        return False

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(
            **self.parts(layer, read),
            scale=1.0,
            barred=dict.fromkeys(("query_key", "key_bias"), POSITIONS),
        )
