"""Gemma 1 to 3: Llama's names, heads of a width of their own, a scale of their own, and scores that may be capped."""

from __future__ import annotations

from dataclasses import replace

from gaugekit.models.decoders.llama import Llama
from gaugekit.models.family import Read
from gaugekit.models.view import CAPPED, AttentionView


class Gemma(Llama):
    """Decoders of model_type "gemma", "gemma2" and "gemma3_text"."""

    names = ("gemma", "gemma2", "gemma3_text")

    @property
    def head_width(self) -> int:
        return self.config.get("head_dim") or 256

    @property
    def scale(self) -> float:
        if self.name == "gemma":
            return super().scale
        return self.config.get("query_pre_attn_scalar", 256) ** -0.5

    @property
    def normed(self) -> bool:
        return self.name == "gemma3_text"

    def attention(self, layer: int, read: Read) -> AttentionView:
        view = super().attention(layer, read)
        causal = not self.config.get("use_bidirectional_attention")
        softcap = self.config.get("attn_logit_softcapping", 50.0) if self.name == "gemma2" else None
        if softcap is None:
            return replace(view, causal=causal)
        return replace(view, causal=causal, softcap=softcap, barred={**view.barred, "key_bias": CAPPED})
