"""DistilBERT: separate nn.Linear projections (weight [out, in]) under transformer.layer.<l>.attention."""

from __future__ import annotations

from gaugekit.models.family import Read
from gaugekit.models.linears import Linears
from gaugekit.models.view import AttentionView

PARTS = {"q": "q_lin", "k": "k_lin", "v": "v_lin", "o": "out_lin"}


class DistilBert(Linears):
    """Encoders of model_type "distilbert"."""

    names = ("distilbert",)
    anchor = "transformer.layer.0.attention.out_lin.weight"

    def check(self) -> None:
        self.refuse_odd_heads()
        if self.size % self.heads("q"):
            raise ValueError(f"dim: expected a multiple of n_heads={self.heads('q')}, got {self.size}")

    @property
    def layers(self) -> int:
        return self.config["n_layers"]

    @property
    def size(self) -> int:
        return self.config["dim"]

    def heads(self, part: str) -> int:
        return self.config["n_heads"]

    def block(self, layer: int) -> str:
        return f"transformer.layer.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        return {part: f"{self.block(layer)}.attention.{path}" for part, path in PARTS.items()}

    def biased(self, part: str) -> bool:
        return True

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(**self.parts(layer, read), scale=self.head_width**-0.5)
