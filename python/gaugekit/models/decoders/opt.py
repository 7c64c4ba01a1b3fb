"""OPT: four nn.Linear projections under layers.<l>.self_attn, learned positions, LayerNorms before each part."""

from __future__ import annotations

from gaugekit.models.family import Read
from gaugekit.models.linears import Linears
from gaugekit.models.stream import Junction, Mlp, Stream
from gaugekit.models.view import AttentionView


class Opt(Linears):
    """Decoders of model_type "opt"."""

    names = ("opt",)
    anchor = "layers.0.self_attn.out_proj.weight"

    def check(self) -> None:
        heads = self.heads("q")
        if self.size % heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads={heads}, got {self.size}"
            )

    def block(self, layer: int) -> str:
        return f"layers.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        return {part: f"{self.block(layer)}.self_attn.{name}" for part, name in names.items()}

    def biased(self, part: str) -> bool:
        return bool(self.config.get("enable_bias", True))

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(**self.parts(layer, read), scale=self.head_width**-0.5, causal=True)

    def stream(self) -> Stream:
        for name, expected in (
            ("do_layer_norm_before", True),
            ("_remove_final_layer_norm", False),
            ("layer_norm_elementwise_affine", True),
            ("word_embed_proj_dim", self.size),
        ):
            if self.config.get(name, expected) != expected:
                raise ValueError(
                    f"{name}: expected {expected}, got {self.config[name]}: no view of that stream"
                )
        return Stream(
            size=self.size,
            junctions=tuple(self._junctions(layer) for layer in range(self.layers)),
            tokens="embed_tokens",
            positions="embed_positions",
            norm="final_layer_norm",
            head="lm_head",
            tied=bool(self.config.get("tie_word_embeddings", True)),
            eps=1e-5,  # torch's own for a LayerNorm: OPT's config has no entry
            centred=True,
            dropouts=("dropout", "layerdrop"),
        )

    def _junctions(self, layer: int) -> tuple[Junction, Junction]:
        block, (*readers, writer) = self.block(layer), self.projections(layer).values()
        mlp = Mlp(f"{block}.fc1", f"{block}.fc2", self.config.get("activation_function", "relu"))
        return (
            Junction(f"{block}.self_attn_layer_norm", tuple(readers), (writer,)),
            Junction(f"{block}.final_layer_norm", (mlp.up,), (mlp.down,), mlp),
        )
