"""Cohere and others that turn neighbours: Llama's names, channels 2i and 2i + 1 a rotary pair."""

from __future__ import annotations

from dataclasses import replace

from gaugekit.models import rope
from gaugekit.models.decoders.llama import Llama
from gaugekit.models.family import Read
from gaugekit.models.view import AttentionView

UNBIASED = ("glm", "helium")  # in their output


class Cohere(Llama):
    """Decoders of model_type "cohere", "cohere2", "glm" and "helium".

    Cohere 2 turns nothing in layers that see the whole text. GLM turns a share of each head.
    """

    names = ("cohere", "cohere2", *UNBIASED)

    @property
    def base(self) -> float:
        return {"cohere": 500_000.0, "helium": 100_000.0}.get(self.name, 10_000.0)

    def biased(self, part: str) -> bool:
        if part == "o" and self.name in UNBIASED:
            return False
        return bool(self.config.get("attention_bias", self.name == "glm"))

    @property
    def normed(self) -> bool:
        return self.name == "cohere" and bool(self.config.get("use_qk_norm"))

    def kind(self, layer: int) -> str | None:
        if self.name != "cohere2" or self.config.get("layer_types"):
            return super().kind(layer)
        every = self.config.get("sliding_window_pattern", 4)
        return "sliding_attention" if (layer + 1) % every else "full_attention"

    def rotary(self, layer: int) -> int:
        if self.name == "glm":
            return rope.channels(self.config, self.head_width, 0.5)
        if self.name == "cohere2" and (
            self.kind(layer) != "sliding_attention" or self.config.get("sliding_window", 4096) is None
        ):
            return 0
        return self.head_width

    def attention(self, layer: int, read: Read) -> AttentionView:
        return replace(super().attention(layer, read), interleaved=True)
