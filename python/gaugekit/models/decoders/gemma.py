"""Gemma 1 to 3: Llama's names, heads of a width of their own, a scale of their own, and scores that may be capped."""

from __future__ import annotations

from dataclasses import replace

from gaugekit.models import rope
from gaugekit.models.decoders.llama import Llama
from gaugekit.models.family import Read
from gaugekit.models.stream import Junction, Stream
from gaugekit.models.view import CAPPED, AttentionView


class Gemma(Llama):
    """Decoders of model_type "gemma", "gemma2" and "gemma3_text"."""

    names = ("gemma", "gemma2", "gemma3_text")
    ties = True

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

    def kind(self, layer: int) -> str | None:
        if self.name != "gemma3_text" or self.config.get("layer_types"):
            return super().kind(layer)
        every = self.config.get("sliding_window_pattern", 6)
        return "sliding_attention" if (layer + 1) % every else "full_attention"

    def rotary_base(self, layer: int) -> float:
        """Gemma 3 turns by another base under its window, which no scaling of ``rope_scaling`` touches."""
        if self.name != "gemma3_text":
            return super().rotary_base(layer)
        if self.kind(layer) == "full_attention":
            return rope.base(self.config, 1_000_000.0, kind="full_attention")
        parameters = self.config.get("rope_parameters") or {}
        return float(
            (parameters.get("sliding_attention") or {}).get("rope_theta")
            or self.config.get("rope_local_base_freq")
            or 10_000.0
        )

    @property
    def behind(self) -> bool:
        return self.name != "gemma"

    @property
    def unsliced(self) -> str | None:
        alone = "model: its stream cannot be sliced: its norms multiply by 1 + w, and slicing's by w"
        return super().unsliced or alone

    def streams(self) -> tuple[Stream, ...]:
        return (self.whole_stream(offset=1.0),)

    def junctions(self, block: str) -> tuple[Junction, Junction]:
        """Gemma 2 and 3 have norms before their parts and behind them."""
        if not self.behind:
            return super().junctions(block)
        around = ("input", "pre_feedforward", "post_attention", "post_feedforward")
        return self.around(block, *(f"{place}_layernorm" for place in around))

    def attention(self, layer: int, read: Read) -> AttentionView:
        view = super().attention(layer, read)
        # Gemma 2 has a causal mask whatever the entry says.
        causal = self.name == "gemma2" or not self.config.get("use_bidirectional_attention")
        softcap = self.config.get("attn_logit_softcapping", 50.0) if self.name == "gemma2" else None
        if softcap is None:
            return replace(view, causal=causal)
        return replace(view, causal=causal, softcap=softcap, barred={**view.barred, "key_bias": CAPPED})
