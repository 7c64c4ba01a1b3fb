"""StableLM: Llama's names, but only the first channels of a head turn, and queries and keys may have norms."""

from __future__ import annotations

from gaugekit.models import rope
from gaugekit.models.decoders.llama import Llama
from gaugekit.models.family import Family
from gaugekit.models.stream import Stream


class StableLm(Llama):
    """Decoders of model_type "stablelm"."""

    names = ("stablelm",)
    partial = 0.25  # the share of a head's channels that turns where the config does not say

    def rotary(self, layer: int) -> int:
        return rope.channels(self.config, self.head_width, self.partial)

    def check(self) -> None:
        super().check()
        heads, width = self.heads("q"), self.head_width
        if heads * width != self.size:
            raise ValueError(f"hidden_size: expected {heads} heads of width {width}, got {self.size}")

    def biased(self, part: str) -> bool:
        return part in "qkv" and bool(self.config.get("use_qkv_bias"))

    @property
    def normed(self) -> bool:
        return bool(self.config.get("qk_layernorm"))

    def stream(self) -> Stream:
        return Family.stream(self)  # LayerNorms, and blocks that may be parallel: not Llama's
