"""MPT: Wqkv (queries, keys, values) and out_proj without biases, under blocks.<l>.attn; ALiBi in the scores."""

from __future__ import annotations

from gaugekit.models.decoders.fused.alibi import slopes
from gaugekit.models.family import Read
from gaugekit.models.fused import Fused
from gaugekit.models.view import AttentionView


class Mpt(Fused):
    """Decoders of model_type "mpt", as transformers runs them: with ALiBi, one key a head, without biases."""

    names = ("mpt",)
    anchor = "blocks.0.attn.out_proj.weight"

    def check(self) -> None:
        if self.size % self.heads("q"):
            raise ValueError(f"d_model: expected a multiple of n_heads={self.heads('q')}, got {self.size}")
        clip = self._attention.get("clip_qkv")
        if clip:
            raise ValueError(
                f"attn_config: expected clip_qkv null, got {clip}: queries, keys and values that are cut off at a "
                "number leave no group"
            )

    @property
    def layers(self) -> int:
        return self.entry("n_layers", "num_hidden_layers")

    @property
    def size(self) -> int:
        return self.entry("d_model", "hidden_size")

    def heads(self, part: str) -> int:
        return self.entry("n_heads", "num_attention_heads")

    def block(self, layer: int) -> str:
        return f"blocks.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        path = f"{self.block(layer)}.attn"
        return {**dict.fromkeys("qkv", f"{path}.Wqkv"), "o": f"{path}.out_proj"}

    def biased(self, part: str) -> bool:
        return False

    def attention(self, layer: int, read: Read) -> AttentionView:
        scale = self._attention.get("softmax_scale")
        scale = self.head_width**-0.5 if scale is None else scale
        return AttentionView(
            **self.parts(layer, read), scale=scale, causal=True, slopes=slopes(self.heads("q"))
        )

    @property
    def _attention(self) -> dict:
        return self.config.get("attn_config") or {}
