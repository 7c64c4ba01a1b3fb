"""BART and its kin: separate nn.Linear projections under <stack>.layers.<l>.self_attn and encoder_attn."""

from __future__ import annotations

from gaugekit.models.encoder_decoders.stacks import EncoderDecoder, Stack
from gaugekit.models.family import Read
from gaugekit.models.view import AttentionView

NAMES = (
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "blenderbot",
    "blenderbot-small",
    "m2m_100",
    "plbart",
    "whisper",
)
UNBIASED = {"whisper": "k"}  # the parts without a bias
PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


class BartStack(Stack):
    """BART's attention of one kind."""

    names = NAMES

    def check(self) -> None:
        if self.size % self.heads("q"):
            expected = f"a multiple of {self.side}_attention_heads={self.heads('q')}"
            raise ValueError(f"d_model: expected {expected}, got {self.size}")

    @property
    def layers(self) -> int:
        return self.config[f"{self.side}_layers"]

    @property
    def head_width(self) -> int:
        return self.size // self.heads("q")

    def heads(self, part: str) -> int:
        return self.config[f"{self.side}_attention_heads"]

    def biased(self, part: str) -> bool:
        return part not in UNBIASED.get(self.name, "")

    def block(self, layer: int) -> str:
        return f"{self.side}.layers.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        attention = "encoder_attn" if self.kind == "cross" else "self_attn"
        return {part: f"{self.block(layer)}.{attention}.{path}" for part, path in PARTS.items()}

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(
            **self.parts(layer, read),
            scale=self.head_width**-0.5,
            causal=self.kind == "decoder",
            cross=self.kind == "cross",
        )


class Bart(EncoderDecoder):
    """Encoder-decoders of the model types in ``NAMES``, and their encoders alone."""

    names = NAMES
    anchor = "encoder.layers.0.self_attn.out_proj.weight"
    stack = BartStack
