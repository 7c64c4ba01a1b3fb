"""GPT-J: four nn.Linear projections without biases under h.<l>.attn; of each head some neighbours turn."""

from __future__ import annotations

import re

from gaugekit.models import rope
from gaugekit.models.family import Read
from gaugekit.models.linears import Linears
from gaugekit.models.view import AttentionView


class GptJ(Linears):
    """Decoders of model_type "gptj"."""

    names = ("gptj",)
    anchor = "h.0.attn.out_proj.weight"

    def check(self) -> None:
        if self.size % self.heads("q"):
            raise ValueError(f"n_embd: expected a multiple of n_head={self.heads('q')}, got {self.size}")
        rope.check(self._rotary, self.head_width, "rotary_dim")

    @property
    def layers(self) -> int:
        return self.config["n_layer"]

    @property
    def size(self) -> int:
        return self.config["n_embd"]

    def heads(self, part: str) -> int:
        return self.config["n_head"]

    def block(self, layer: int) -> str:
        return f"h.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        return {part: f"{self.block(layer)}.attn.{name}" for part, name in names.items()}

    def biased(self, part: str) -> bool:
        return False

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(
            **self.parts(layer, read),
            scale=self.head_width**-0.5,
            rotary=self._rotary,
            interleaved=True,
            causal=True,
        )

    def recomputed(self, name: str) -> bool:
        return re.search(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$", name) is not None

    @property
    def _rotary(self) -> int:
        return self.config.get("rotary_dim", 64)
