"""T5: separate nn.Linear projections without biases under <stack>.block.<l>.layer.<n>.<kind>Attention."""

from __future__ import annotations

from gaugekit.models.encoder_decoders.stacks import EncoderDecoder, Stack
from gaugekit.models.family import Read
from gaugekit.models.view import AttentionView

NAMES = ("t5", "mt5", "umt5")


class T5Stack(Stack):
    """T5's attention of one kind; self-attention adds a bias of position to its scores, which no view knows of."""

    names = NAMES

    def check(self) -> None:
        for entry in ("d_model", "d_kv", "num_heads", "num_layers"):
            if self.config[entry] < 1:
                raise ValueError(f"{entry}: expected a positive number, got {self.config[entry]}")

    @property
    def layers(self) -> int:
        layers = self.config["num_layers"]
        return layers if self.side == "encoder" else self.config.get("num_decoder_layers") or layers

    @property
    def head_width(self) -> int:
        return self.config["d_kv"]

    def heads(self, part: str) -> int:
        return self.config["num_heads"]

    def biased(self, part: str) -> bool:
        return False

    def block(self, layer: int) -> str:
        return f"{self.side}.block.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        attention = "layer.1.EncDecAttention" if self.kind == "cross" else "layer.0.SelfAttention"
        return {part: f"{self.block(layer)}.{attention}.{part}" for part in "qkvo"}

    def attention(self, layer: int, read: Read) -> AttentionView:
        shared = self.name != "umt5" and self.kind != "cross"  # UMT5 has a table for each layer
        return AttentionView(
            **self.parts(layer, read),
            scale=1.0,
            causal=self.kind == "decoder",
            cross=self.kind == "cross",
            shared_bias=f"{self.block(0)}.layer.0.SelfAttention.relative_attention_bias" if shared else None,
        )


class T5(EncoderDecoder):
    """Encoder-decoders of model_type "t5", "mt5" and "umt5", and their encoders alone."""

    names = NAMES
    anchor = "encoder.block.0.layer.0.SelfAttention.o.weight"
    stack = T5Stack

    @property
    def unstreamed(self) -> str | None:
        if self.name == "umt5":
            return self.divided
        return self.divided or "its first block hands the bias of position on to the others"
