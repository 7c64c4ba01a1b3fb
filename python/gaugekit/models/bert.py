"""BERT: separate nn.Linear projections (weight [out, in]) under encoder.layer.<l>.attention."""

from __future__ import annotations

from .family import Family, Read, bias_or_zeros, join, split
from .view import AttentionView, Compact, Projection, Stored

PARTS = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}


class Bert(Family):
    """Encoders of model_type "bert" (and causal decoders of that type, without cross-attention)."""

    name = "bert"
    anchor = "encoder.layer.0.attention.output.dense.weight"

    def check(self, config: dict) -> None:
        position = config.get("position_embedding_type") or "absolute"
        if position != "absolute":
            raise ValueError(
                f"position_embedding_type: expected 'absolute', got {position!r} (a relative one adds position to the "
                "scores, and the key/query symmetry no longer holds)"
            )
        if config.get("add_cross_attention"):
            raise ValueError("add_cross_attention: expected false, got true (cross-attention is not covered)")
        if config.get("pruned_heads"):
            raise ValueError(f"pruned_heads: expected none, got {config['pruned_heads']}")
        size, heads = config["hidden_size"], config["num_attention_heads"]
        if size % heads:
            raise ValueError(f"hidden_size: expected a multiple of num_attention_heads={heads}, got {size}")

    def layers(self, config: dict) -> int:
        return config["num_hidden_layers"]

    def block(self, layer: int) -> str:
        return f"encoder.layer.{layer}"

    def projections(self, config: dict, layer: int) -> dict[str, str]:
        return {part: f"{self.block(layer)}.attention.{path}" for part, path in PARTS.items()}

    def shapes(self, config: dict, layer: int) -> dict[str, tuple[int, ...]]:
        size = config["hidden_size"]
        shapes = {}
        for path in self.projections(config, layer).values():
            shapes |= {f"{path}.weight": (size, size), f"{path}.bias": (size,)}
        return shapes

    def attention(self, config: dict, layer: int, read: Read) -> AttentionView:
        heads = config["num_attention_heads"]
        tensors = self.take(config, layer, read)
        parts = {}
        for part, path in self.projections(config, layer).items():
            weight, bias = tensors[f"{path}.weight"].mT, tensors[f"{path}.bias"]
            if part == "o":
                parts[part] = Projection(weight.unflatten(0, (heads, -1)), bias)
            else:
                parts[part] = Projection(split(weight, heads), bias.unflatten(0, (heads, -1)))
        width = config["hidden_size"] // heads
        return AttentionView(**parts, scale=width**-0.5, causal=bool(config.get("is_decoder")))

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
            tensors[f"{path}.bias"] = bias_or_zeros(projection.bias, weight.shape[1])
        return Stored(tensors, modules)
