"""T5's encoder: separate nn.Linear projections without biases under encoder.block.<l>.layer.0.SelfAttention."""

from __future__ import annotations

from gaugekit.models.family import Read
from gaugekit.models.linears import Linears
from gaugekit.models.view import POSITIONS, AttentionView

NAMES = ("t5", "mt5", "umt5")


class T5(Linears):
    """Self-attention of encoders of model_type "t5", "mt5" and "umt5"; a decoder beside them is left as it is."""

    anchor = "encoder.block.0.layer.0.SelfAttention.o.weight"

    def __init__(self, name: str = "t5"):
        self.name = name

    def check(self, config: dict) -> None:
        for entry in ("d_model", "d_kv", "num_heads", "num_layers"):
            if config[entry] < 1:
                raise ValueError(f"{entry}: expected a positive number, got {config[entry]}")

    def layers(self, config: dict) -> int:
        return config["num_layers"]

    def block(self, layer: int) -> str:
        return f"encoder.block.{layer}"

    def projections(self, config: dict, layer: int) -> dict[str, str]:
        return {part: f"{self.block(layer)}.layer.0.SelfAttention.{part}" for part in "qkvo"}

    def shapes(self, config: dict, layer: int) -> dict[str, tuple[int, ...]]:
        size, inner = config["d_model"], config["num_heads"] * config["d_kv"]
        return {
            f"{path}.weight": (size, inner) if part == "o" else (inner, size)
            for part, path in self.projections(config, layer).items()
        }

    def heads(self, config: dict, part: str) -> int:
        return config["num_heads"]

    def biased(self, config: dict, part: str) -> bool:
        return False

    def attention(self, config: dict, layer: int, read: Read) -> AttentionView:
        return AttentionView(
            **self.parts(config, layer, read),
            scale=1.0,
            barred=dict.fromkeys(("query_key", "key_bias"), POSITIONS),
        )
