"""GPT-Neo: four nn.Linear projections under h.<l>.attn.attention, learned positions, scores that are not scaled."""

from __future__ import annotations

import re

from gaugekit.models.family import Read
from gaugekit.models.linears import Linears
from gaugekit.models.view import AttentionView


class GptNeo(Linears):
    """Decoders of model_type "gpt_neo"; in every second layer a token sees the last few only."""

    names = ("gpt_neo",)
    anchor = "h.0.attn.attention.out_proj.weight"

    def check(self) -> None:
        if self.size % self.heads("q"):
            raise ValueError(
                f"hidden_size: expected a multiple of num_heads={self.heads('q')}, got {self.size}"
            )

    @property
    def layers(self) -> int:
        return self.entry("num_layers", "num_hidden_layers")

    def heads(self, part: str) -> int:
        return self.entry("num_heads", "num_attention_heads")

    def block(self, layer: int) -> str:
        return f"h.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        return {part: f"{self.block(layer)}.attn.attention.{name}" for part, name in names.items()}

    def biased(self, part: str) -> bool:
        return part == "o"

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(**self.parts(layer, read), scale=1.0, causal=True)

    def recomputed(self, name: str) -> bool:
        return re.search(r"(^|\.)h\.\d+\.attn\.attention\.(bias|masked_bias)$", name) is not None
