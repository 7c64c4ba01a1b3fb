"""GPT-NeoX and Pythia: query_key_value head by head and dense, under layers.<l>.attention; a share of a head turns."""

from __future__ import annotations

import re

from gaugekit.models import rope
from gaugekit.models.family import Read
from gaugekit.models.fused import HeadByHead
from gaugekit.models.view import AttentionView


class GptNeoX(HeadByHead):
    """Decoders of model_type "gpt_neox"."""

    names = ("gpt_neox",)
    anchor = "layers.0.attention.dense.weight"
    attention_name = "attention"

    def check(self) -> None:
        heads = self.heads("q")
        if self.size % heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads={heads}, got {self.size}"
            )

    @property
    def head_width(self) -> int:
        return self.size // self.heads("q")

    def block(self, layer: int) -> str:
        return f"layers.{layer}"

    def biased(self, part: str) -> bool:
        return bool(self.config.get("attention_bias", True))

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(
            **self.parts(layer, read),
            scale=self.head_width**-0.5,
            rotary=rope.channels(self.config, self.head_width, 0.25, older="rotary_pct"),
            causal=True,
            rotary_base=rope.base(self.config, older="rotary_emb_base"),
        )

    def recomputed(self, name: str) -> bool:
        leaf = r"(^|\.)layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$"
        return re.search(leaf, name) is not None
