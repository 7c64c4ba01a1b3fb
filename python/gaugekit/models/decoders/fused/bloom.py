"""BLOOM: query_key_value head by head and dense, under h.<l>.self_attention; ALiBi in the scores."""

from __future__ import annotations

from gaugekit.models.decoders.fused.alibi import slopes
from gaugekit.models.family import Read
from gaugekit.models.fused import HeadByHead
from gaugekit.models.view import AttentionView


class Bloom(HeadByHead):
    """Decoders of model_type "bloom".

    What ALiBi adds to a score says nothing of query and key: their product is all the weights give, and every group
    holds.
    """

    names = ("bloom",)
    anchor = "h.0.self_attention.dense.weight"
    attention_name = "self_attention"

    def check(self) -> None:
        if self.size % self.heads("q"):
            raise ValueError(f"hidden_size: expected a multiple of n_head={self.heads('q')}, got {self.size}")

    @property
    def layers(self) -> int:
        return self.entry("n_layer", "num_hidden_layers")

    @property
    def size(self) -> int:
        return self.entry("n_embed", "hidden_size")

    def heads(self, part: str) -> int:
        return self.entry("n_head", "num_attention_heads")

    def block(self, layer: int) -> str:
        return f"h.{layer}"

    def biased(self, part: str) -> bool:
        return True

    def attention(self, layer: int, read: Read) -> AttentionView:
        scale, own = self.head_width**-0.5, slopes(self.heads("q"))
        return AttentionView(**self.parts(layer, read), scale=scale, causal=True, slopes=own)
