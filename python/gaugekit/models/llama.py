"""Llama and its kin: separate nn.Linear projections under layers.<l>.self_attn, rotary positions, shared key heads."""

from __future__ import annotations

from .family import Family, Read, bias_or_zeros, join, split
from .view import AttentionView, Compact, Projection, Stored

NAMES = ("llama", "mistral", "qwen2")
BIASED = {"qwen2": "qkv"}  # the parts with biases where no config entry says so


class Llama(Family):
    """Decoders of model_type "llama", "mistral" and "qwen2": every channel of a head is turned by position."""

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
            if self._biased(config, part):
                shapes[f"{path}.bias"] = (outputs[part],)
        return shapes

    def attention(self, config: dict, layer: int, read: Read) -> AttentionView:
        heads, groups, width = self._sizes(config)
        tensors = self.take(config, layer, read)
        parts = {}
        for part, path in self.projections(config, layer).items():
            weight, bias = tensors[f"{path}.weight"].mT, tensors.get(f"{path}.bias")
            if part == "o":
                parts[part] = Projection(weight.unflatten(0, (heads, -1)), bias)
            else:
                count = heads if part == "q" else groups
                parts[part] = Projection(
                    split(weight, count), None if bias is None else bias.unflatten(0, (count, -1))
                )
        rope = config.get("rope_parameters") or {}
        base = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
        return AttentionView(**parts, scale=width**-0.5, rotary=width, causal=True, rotary_base=float(base))

    def store(
        self, config: dict, layer: int, view: AttentionView, compact: dict[str, Compact] | None = None
    ) -> Stored:
        tensors, modules = {}, {}
        for part, path in self.projections(config, layer).items():
            if compact and part in compact:
                tensors |= {f"{path}.{name}": tensor for name, tensor in compact[part].tensors.items()}
                modules[path] = compact[part].spec
                continue
            projection = getattr(view, part)
            weight = projection.weight.flatten(0, 1) if part == "o" else join(projection.weight)
            tensors[f"{path}.weight"] = weight.mT.contiguous()
            if self._biased(config, part):
                tensors[f"{path}.bias"] = bias_or_zeros(projection.bias, weight.shape[1])
        return Stored(tensors, modules)

    def _biased(self, config: dict, part: str) -> bool:
        return bool(config.get("attention_bias")) or part in BIASED.get(self.name, "")

    @staticmethod
    def _sizes(config: dict) -> tuple[int, int, int]:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        return heads, config.get("num_key_value_heads") or heads, width
