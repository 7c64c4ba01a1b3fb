"""Llama and its kin: separate nn.Linear projections under layers.<l>.self_attn, rotary positions, shared key heads."""

from __future__ import annotations

from gaugekit.models.family import Read
from gaugekit.models.linears import Linears
from gaugekit.models.view import NORMS, AttentionView

NORMED = ("qwen3", "qwen3_moe", "olmo2", "olmo3", "gemma3_text", "chameleon")  # queries and keys have norms
NAMES = ("llama", "mistral", "qwen2", *NORMED)
BIASED = {"qwen2": "qkv"}  # the parts with biases where no config entry says so


class Llama(Linears):
    """Decoders of the model types in ``NAMES``: every channel of a head is turned by position."""

    anchor = "layers.0.self_attn.o_proj.weight"

    def __init__(self, name: str = "llama"):
        self.name = name

    def check(self, config: dict) -> None:
        heads, groups, width = self._sizes(config)
        if groups < 1 or heads % groups:
            raise ValueError(f"num_key_value_heads: expected a divisor of {heads} heads, got {groups}")
        if width % 2:
            raise ValueError(f"head_dim: expected an even number under rotary positions, got {width}")

    def layers(self, config: dict) -> int:
        return config["num_hidden_layers"]

    def block(self, layer: int) -> str:
        return f"layers.{layer}"

    def projections(self, config: dict, layer: int) -> dict[str, str]:
        return {part: f"{self.block(layer)}.self_attn.{part}_proj" for part in "qkvo"}

    def shapes(self, config: dict, layer: int) -> dict[str, tuple[int, ...]]:
        (heads, groups, width), size = self._sizes(config), config["hidden_size"]
        outputs = {"q": heads * width, "k": groups * width, "v": groups * width, "o": size}
        shapes = {}
        for part, path in self.projections(config, layer).items():
            shapes[f"{path}.weight"] = (outputs[part], heads * width if part == "o" else size)
            if self.biased(config, part):
                shapes[f"{path}.bias"] = (outputs[part],)
        return shapes

    def heads(self, config: dict, part: str) -> int:
        heads, groups, _ = self._sizes(config)
        return groups if part in "kv" else heads

    def biased(self, config: dict, part: str) -> bool:
        return bool(config.get("attention_bias")) or part in BIASED.get(self.name, "")

    def attention(self, config: dict, layer: int, read: Read) -> AttentionView:
        _, _, width = self._sizes(config)
        rope = config.get("rope_parameters") or {}
        base = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
        scale = (config.get("query_pre_attn_scalar") or width) ** -0.5
        barred = dict.fromkeys(("query_key", "key_bias"), NORMS) if self.name in NORMED else {}
        parts = self.parts(config, layer, read)
        return AttentionView(
            **parts, scale=scale, rotary=width, causal=True, rotary_base=float(base), barred=barred
        )

    @staticmethod
    def _sizes(config: dict) -> tuple[int, int, int]:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        return heads, config.get("num_key_value_heads") or heads, width
