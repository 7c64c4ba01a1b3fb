"""Phi-3: qkv_proj (queries, keys, values) and o_proj without biases, under layers.<l>.self_attn; shared key heads."""

from __future__ import annotations

from gaugekit.models import rope
from gaugekit.models.family import Read
from gaugekit.models.fused import Fused
from gaugekit.models.view import AttentionView


class Phi3(Fused):
    """Decoders of model_type "phi3" (Phi-3, Phi-4): all of a head turns, or a share of it."""

    names = ("phi3",)
    anchor = "layers.0.self_attn.o_proj.weight"

    def check(self) -> None:
        heads, groups = self.heads("q"), self.heads("k")
        if groups < 1 or heads % groups:
            raise ValueError(f"num_key_value_heads: expected a divisor of {heads} heads, got {groups}")

    def block(self, layer: int) -> str:
        return f"layers.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        path = f"{self.block(layer)}.self_attn"
        return {**dict.fromkeys("qkv", f"{path}.qkv_proj"), "o": f"{path}.o_proj"}

    def heads(self, part: str) -> int:
        heads = self.config["num_attention_heads"]
        return (self.config.get("num_key_value_heads") or heads) if part in "kv" else heads

    def biased(self, part: str) -> bool:
        return False

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(
            **self.parts(layer, read),
            scale=self.head_width**-0.5,
            rotary=rope.channels(self.config, self.head_width, 1.0),
            causal=True,
            rotary_base=rope.base(self.config),
        )
