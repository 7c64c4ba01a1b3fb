"""GPT-2: one fused projection c_attn for q, k and v (Conv1D: weight [in, out]) and c_proj, under h.<l>.attn."""

from __future__ import annotations

import re

from gaugekit.models.family import Read
from gaugekit.models.fused import Fused
from gaugekit.models.stream import Junction, Mlp, Stream
from gaugekit.models.view import AttentionView


class Gpt2(Fused):
    """Decoders of model_type "gpt2"."""

    names = ("gpt2",)
    anchor = "h.0.attn.c_proj.weight"
    transposed = True

    def check(self) -> None:
        self.refuse_odd_heads()
        if self.size % self.heads("q"):
            raise ValueError(f"n_embd: expected a multiple of n_head={self.heads('q')}, got {self.size}")

    @property
    def layers(self) -> int:
        return self.config["n_layer"]

    def block(self, layer: int) -> str:
        return f"h.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        fused = f"{self.block(layer)}.attn.c_attn"
        return {"q": fused, "k": fused, "v": fused, "o": f"{self.block(layer)}.attn.c_proj"}

    def dropout(self, layer: int) -> str | None:
        return f"{self.block(layer)}.attn.resid_dropout"

    @property
    def size(self) -> int:
        return self.config["n_embd"]

    def heads(self, part: str) -> int:
        return self.config["n_head"]

    def biased(self, part: str) -> bool:
        return True

    def attention(self, layer: int, read: Read) -> AttentionView:
        scale = self.head_width**-0.5 if self.config.get("scale_attn_weights", True) else 1.0
        if self.config.get("scale_attn_by_inverse_layer_idx"):
            scale /= layer + 1
        return AttentionView(**self.parts(layer, read), scale=scale, causal=True)

    def stream(self) -> Stream:
        blocks = [self.block(layer) for layer in range(self.layers)]
        activation = self.config.get("activation_function", "gelu_new")
        return Stream(
            size=self.size,
            junctions=tuple(
                (
                    Junction(f"{block}.ln_1", (f"{block}.attn.c_attn",), (f"{block}.attn.c_proj",)),
                    Junction(
                        f"{block}.ln_2",
                        (f"{block}.mlp.c_fc",),
                        (f"{block}.mlp.c_proj",),
                        Mlp(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj", activation),
                    ),
                )
                for block in blocks
            ),
            tokens="wte",
            positions="wpe",
            norm="ln_f",
            head="lm_head",
            tied=bool(self.config.get("tie_word_embeddings", True)),
            eps=self.config.get("layer_norm_epsilon", 1e-5),
            centred=True,
            transposed=True,
            dropouts=("resid_pdrop",),
        )

    def recomputed(self, name: str) -> bool:
        return re.search(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$", name) is not None
