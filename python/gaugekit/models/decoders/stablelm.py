"""StableLM: Llama's names, but only the first channels of a head turn, and queries and keys may have norms."""

from __future__ import annotations

from dataclasses import replace

from gaugekit.models.decoders.llama import Llama
from gaugekit.models.family import Family, Read
from gaugekit.models.linears import NormLayout
from gaugekit.models.stream import Stream
from gaugekit.models.view import NORMS, AttentionView


class StableLm(Llama):
    """Decoders of model_type "stablelm"."""

    names = ("stablelm",)
    partial = 0.25  # the share of a head's channels that turns where the config does not say

    @property
    def rotary(self) -> int:
        """How many channels of a head turn; older configs give the share of them outside ``rope_parameters``."""
        rope = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        share = rope.get("partial_rotary_factor", self.config.get("partial_rotary_factor", self.partial))
        return int(self.head_width * share)

    def check(self) -> None:
        super().check()
        heads, width, rotary = self.heads("q"), self.head_width, self.rotary
        if heads * width != self.size:
            raise ValueError(f"hidden_size: expected {heads} heads of width {width}, got {self.size}")
        if rotary % 2 or not 0 <= rotary <= width:
            raise ValueError(
                f"partial_rotary_factor: expected a share that is an even number of {width} channels, got {rotary}"
            )

    def biased(self, part: str) -> bool:
        return part in "qkv" and bool(self.config.get("use_qkv_bias"))

    def attention(self, layer: int, read: Read) -> AttentionView:
        normed = self.config.get("qk_layernorm")
        barred = dict.fromkeys(("query_key", "key_bias"), NORMS) if normed else {}
        return replace(super().attention(layer, read), rotary=self.rotary, barred=barred)

    def norms(self, layer: int) -> NormLayout | None:
        """LayerNorms without bias, one module a head."""
        if not self.config.get("qk_layernorm"):
            return None
        shapes = {
            part: {
                f"{self.block(layer)}.self_attn.{part}_layernorm.norms.{head}.weight": (self.head_width,)
                for head in range(self.heads(part))
            }
            for part in "qk"
        }
        return NormLayout(shapes, self.config.get("layer_norm_eps", 1e-5), centred=True)

    def stream(self) -> Stream:
        return Family.stream(self)  # LayerNorms, and blocks that may be parallel: not Llama's
