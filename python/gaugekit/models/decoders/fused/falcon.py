"""Falcon: query_key_value in three layouts and dense, under h.<l>.self_attention; rotary positions, or ALiBi."""

from __future__ import annotations

from gaugekit.models import rope
from gaugekit.models.decoders.fused.alibi import slopes
from gaugekit.models.family import Read
from gaugekit.models.fused import HeadByHead
from gaugekit.models.view import AttentionView


class Falcon(HeadByHead):
    """Decoders of model_type "falcon".

    Each key/value head stands behind its queries in the newer architecture, in the older one one key/value head behind
    all queries (``multi_query``), or each head's query, key and value together.
    """

    names = ("falcon",)
    anchor = "h.0.self_attention.dense.weight"
    attention_name = "self_attention"

    def check(self) -> None:
        heads, groups = self.heads("q"), self.heads("k")
        if self.size % heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads={heads}, got {self.size}"
            )
        if groups < 1 or heads % groups:
            raise ValueError(f"num_kv_heads: expected a divisor of {heads} heads, got {groups}")
        if not self.config.get("alibi"):
            rope.check(self.head_width, self.head_width, "head_dim")

    @property
    def size(self) -> int:
        return self.entry("n_embed", "hidden_size")

    @property
    def head_width(self) -> int:
        return self.size // self.heads("q")

    def heads(self, part: str) -> int:
        heads = self.config["num_attention_heads"]
        if part not in "kv":
            return heads
        if self.config.get("new_decoder_architecture"):
            return self.config.get("num_kv_heads") or heads
        return 1 if self.config.get("multi_query", True) else heads

    def block(self, layer: int) -> str:
        return f"h.{layer}"

    def biased(self, part: str) -> bool:
        return bool(self.config.get("bias", False))

    def attention(self, layer: int, read: Read) -> AttentionView:
        parts, scale = self.parts(layer, read), self.head_width**-0.5
        if self.config.get("alibi"):
            own = tuple(scale * slope for slope in slopes(self.heads("q")))  # it is scaled with the scores
            return AttentionView(**parts, scale=scale, causal=True, slopes=own)
        return AttentionView(
            **parts,
            scale=scale,
            rotary=self.head_width,
            causal=True,
            rotary_base=rope.base(self.config),
        )
