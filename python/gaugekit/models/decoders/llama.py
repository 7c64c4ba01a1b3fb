"""Llama and its kin: separate nn.Linear projections under layers.<l>.self_attn, rotary positions, shared key heads."""

from __future__ import annotations

from gaugekit.models.family import Read
from gaugekit.models.linears import Linears, NormLayout
from gaugekit.models.stream import Junction, Mlp, Stream
from gaugekit.models.view import NORMS, AttentionView

NORMED = ("qwen3", "qwen3_moe", "olmo2", "olmo3", "gemma3_text", "chameleon")  # queries and keys have norms
PER_HEAD = ("qwen3", "qwen3_moe", "gemma3_text")  # one gain that all heads share
WHOLE = ("olmo2", "olmo3")  # one norm over the channels of all heads
NAMES = ("llama", "mistral", "qwen2", *NORMED)
STREAMS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # one norm before attention, one before a plain gated MLP, no more
BIASED = {"qwen2": "qkv"}  # the parts with biases where no config entry says so


class Llama(Linears):
    """Decoders of the model types in ``NAMES``: every channel of a head is turned by position."""

    names = NAMES
    anchor = "layers.0.self_attn.o_proj.weight"

    def check(self) -> None:
        heads, groups, width = self.heads("q"), self.heads("k"), self.head_width
        if groups < 1 or heads % groups:
            raise ValueError(f"num_key_value_heads: expected a divisor of {heads} heads, got {groups}")
        if width % 2:
            raise ValueError(f"head_dim: expected an even number under rotary positions, got {width}")

    def block(self, layer: int) -> str:
        return f"layers.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        return {part: f"{self.block(layer)}.self_attn.{part}_proj" for part in "qkvo"}

    def heads(self, part: str) -> int:
        heads = self.config["num_attention_heads"]
        return (self.config.get("num_key_value_heads") or heads) if part in "kv" else heads

    def biased(self, part: str) -> bool:
        return bool(self.config.get("attention_bias")) or part in BIASED.get(self.name, "")

    def attention(self, layer: int, read: Read) -> AttentionView:
        width = self.head_width
        rope = self.config.get("rope_parameters") or {}
        base = rope.get("rope_theta") or self.config.get("rope_theta") or 10_000.0
        scale = (self.config.get("query_pre_attn_scalar") or width) ** -0.5
        barred = dict.fromkeys(("query_key", "key_bias"), NORMS) if self.name in NORMED else {}
        parts = self.parts(layer, read)
        return AttentionView(
            **parts, scale=scale, rotary=width, causal=True, rotary_base=float(base), barred=barred
        )

    def norms(self, layer: int) -> NormLayout | None:
        """RMSNorms of each head with one gain for all heads, or in OLMo of all heads at once."""
        width, whole = self.head_width, self.name in WHOLE
        if self.name not in (*PER_HEAD, *WHOLE):
            return None
        shapes = {
            part: {
                f"{self.block(layer)}.self_attn.{part}_norm.weight": (
                    self.heads(part) * width if whole else width,
                )
            }
            for part in "qk"
        }
        offset = 1.0 if self.name == "gemma3_text" else 0.0
        eps = self.config.get("rms_norm_eps", 1e-5 if whole else 1e-6)
        return NormLayout(shapes, eps, offset, whole=whole)

    def stream(self) -> Stream:
        if self.name not in STREAMS:
            return super().stream()
        return Stream(
            size=self.size,
            junctions=tuple(self._junctions(self.block(layer)) for layer in range(self.layers)),
            tokens="embed_tokens",
            positions=None,
            norm="norm",
            head="lm_head",
            tied=bool(self.config.get("tie_word_embeddings", False)),
            eps=self.config.get("rms_norm_eps", 1e-6),
            centred=False,
        )

    def _junctions(self, block: str) -> tuple[Junction, Junction]:
        attention = tuple(f"{block}.self_attn.{part}_proj" for part in "qkvo")
        activation = self.config.get("hidden_act", "silu")
        gate, up, down = (f"{block}.mlp.{part}_proj" for part in ("gate", "up", "down"))
        return (
            Junction(f"{block}.input_layernorm", attention[:3], attention[3:]),
            Junction(
                f"{block}.post_attention_layernorm", (gate, up), (down,), Mlp(up, down, activation, gate)
            ),
        )
