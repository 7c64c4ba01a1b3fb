"""ModernBERT: one fused projection Wqkv for q, k and v (weight [out, in]), rotary positions, no mask."""

from __future__ import annotations

from gaugekit.models import rope
from gaugekit.models.family import Read
from gaugekit.models.fused import Fused
from gaugekit.models.view import AttentionView

# The kinds of layer: what older configs call the base of their angles, and its default.
BASES = {
    "full_attention": ("global_rope_theta", 160_000.0),
    "sliding_attention": ("local_rope_theta", 10_000.0),
}


class ModernBert(Fused):
    """Encoders of model_type "modernbert": every channel turns by position, in local layers by another base.

    Local layers see a window of tokens; a view knows nothing of it, since no rewrite touches what a token sees.
    """

    names = ("modernbert",)
    anchor = "layers.0.attn.Wo.weight"

    def check(self) -> None:
        size, heads = self.size, self.heads("q")
        if size % heads or size // heads % 2:
            raise ValueError(f"hidden_size: expected {heads} heads of one even width, got {size}")
        self.refuse_short("layer_types")
        for layer in range(self.layers):
            if self._kind(layer) not in BASES:
                raise ValueError(f"layer_types: expected {' or '.join(BASES)}, got {self._kind(layer)!r}")

    def block(self, layer: int) -> str:
        return f"layers.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        fused, out = (f"{self.block(layer)}.attn.{path}" for path in ("Wqkv", "Wo"))
        return {"q": fused, "k": fused, "v": fused, "o": out}

    @property
    def head_width(self) -> int:
        return self.size // self.heads("q")

    def biased(self, part: str) -> bool:
        return bool(self.config.get("attention_bias"))

    def attention(self, layer: int, read: Read) -> AttentionView:
        older, default = BASES[self._kind(layer)]
        base = rope.base(self.config, default, older, self._kind(layer))
        width = self.head_width
        return AttentionView(**self.parts(layer, read), scale=width**-0.5, rotary=width, rotary_base=base)

    def _kind(self, layer: int) -> str:
        kinds = self.config.get("layer_types")
        if kinds:
            return kinds[layer]
        return (
            "sliding_attention"
            if layer % self.config.get("global_attn_every_n_layers", 3)
            else "full_attention"
        )
