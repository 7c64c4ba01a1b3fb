"""Phi: a partial rotary attention and an MLP side by side, both reading one LayerNorm."""

from __future__ import annotations

from gaugekit.models.decoders.stablelm import StableLm
from gaugekit.models.linears import NormLayout
from gaugekit.models.stream import Junction, Mlp, Stream


class Phi(StableLm):
    """Decoders of model_type "phi" (Phi-1, Phi-1.5, Phi-2)."""

    names = ("phi",)
    anchor = "layers.0.self_attn.dense.weight"
    partial = 0.5

    def projections(self, layer: int) -> dict[str, str]:
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "dense"}
        return {part: f"{self.block(layer)}.self_attn.{name}" for part, name in names.items()}

    def biased(self, part: str) -> bool:
        return True

    def norms(self, layer: int) -> NormLayout | None:
        """None: Phi's norms of queries and keys have biases, for which a view has no place."""
        return None

    def stream(self) -> Stream:
        return Stream(
            size=self.size,
            junctions=tuple((self._junction(layer),) for layer in range(self.layers)),
            tokens="embed_tokens",
            positions=None,
            norm="final_layernorm",
            head="lm_head",
            tied=bool(self.config.get("tie_word_embeddings", False)),
            eps=self.config.get("layer_norm_eps", 1e-5),
            centred=True,
            dropouts=("resid_pdrop",),
        )

    def _junction(self, layer: int) -> Junction:
        block, (*readers, writer) = self.block(layer), self.projections(layer).values()
        mlp = Mlp(f"{block}.mlp.fc1", f"{block}.mlp.fc2", self.config.get("hidden_act", "gelu_new"))
        return Junction(f"{block}.input_layernorm", (*readers, mlp.up), (writer, mlp.down), mlp)
