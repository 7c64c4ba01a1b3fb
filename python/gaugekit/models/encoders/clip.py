"""CLIP and SigLIP: a tower for text and a tower for images, alone or side by side in one model."""

from __future__ import annotations

from collections.abc import Iterable

from gaugekit.models.compound import Compound, Place
from gaugekit.models.family import Family, Read
from gaugekit.models.linears import Linears
from gaugekit.models.stream import Exchange, Junction, Mlp, Part, Stream
from gaugekit.models.view import AttentionView

# What a config leaves out where it is the default: published ones of SigLIP hold no sizes at all.
DEFAULTS = {
    "clip_text_model": {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 12},
    "clip_vision_model": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "siglip_text_model": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "siglip_vision_model": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
}
PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
TOWERS = ("text", "vision")
# What a config leaves out of a family: ε of its norms, what its MLPs have
EPS = {"clip": 1e-5, "siglip": 1e-6}
ACTIVATIONS = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
HEADS = {
    "clip_text_model": "text_projection",
    "clip_vision_model": "visual_projection",
    "siglip_text_model": "text_model.head",
    "siglip_vision_model": "vision_model.head.attention",
}
UNSLICED = (
    "model: a tower's stream cannot be sliced: slicing takes models of language, whose head reads every token"
)


class Tower(Linears):
    """One tower: separate nn.Linear projections under encoder.layers.<l>.self_attn; CLIP's text has a causal mask.

    The pooling of SigLIP's images, an nn.MultiheadAttention, is left as it is.
    """

    names = tuple(DEFAULTS)
    unsliced = UNSLICED
    anchor = "encoder.layers.0.self_attn.out_proj.weight"

    def check(self) -> None:
        if self.size % self.heads("q"):
            expected = f"a multiple of num_attention_heads={self.heads('q')}"
            raise ValueError(f"hidden_size: expected {expected}, got {self.size}")

    @property
    def layers(self) -> int:
        return self._entry("num_hidden_layers")

    @property
    def size(self) -> int:
        return self._entry("hidden_size")

    @property
    def head_width(self) -> int:
        return self.size // self.heads("q")

    def heads(self, part: str) -> int:
        return self._entry("num_attention_heads")

    def block(self, layer: int) -> str:
        return f"encoder.layers.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        return {part: f"{self.block(layer)}.self_attn.{path}" for part, path in PARTS.items()}

    def biased(self, part: str) -> bool:
        return True

    def attention(self, layer: int, read: Read) -> AttentionView:
        causal = self.name == "clip_text_model"
        return AttentionView(**self.parts(layer, read), scale=self.head_width**-0.5, causal=causal)

    def streams(self) -> tuple[Stream, ...]:
        """SigLIP's towers alone show all that their last norm gives; CLIP's have a projection beside, or none."""
        return (self.tower("", HEADS[self.name] if self.name.startswith("clip") else None),)

    def tower(self, path: str, head: str | None) -> Stream:
        """The stream of a tower at ``path`` in its model, whose ``head`` reads the last norm."""
        kind, images = self.name.partition("_")[0], self.name.endswith("vision_model")
        table, start = f"{path}embeddings.position_embedding", f"{path}embeddings.patch_embedding"
        token = f"{path}embeddings.class_embedding"
        first = images and kind == "clip"  # its images have a class token, and a norm before the blocks
        exchange = (
            Exchange((token,), f"{table}.weight", 0, 1)
            if first
            else Exchange((f"{start}.bias",), f"{table}.weight")
        )
        pooled = [f"{head}.in_proj_{leaf}" for leaf in ("weight", "bias")]
        return Stream(
            size=self.size,
            junctions=tuple(self._junctions(path + self.block(layer)) for layer in range(self.layers)),
            tokens=None if images else f"{path}embeddings.token_embedding",
            positions=table,
            norm=f"{path}{'post_layernorm' if images else 'final_layer_norm'}",
            head=head,
            tied=False,
            eps=self.config.get("layer_norm_eps", EPS[kind]),
            centred=True,
            tables=(token,) if first else (),
            patches=start if images else None,
            entries=(f"{path}pre_layrnorm",) if first else (),
            exchanges=(exchange,) if images else (),
            # keys and values of the attention that pools SigLIP's images; its queries read a vector of its own
            parts={head: Part(*pooled, self.size, 3 * self.size)}
            if head and head.endswith("attention")
            else {},
            raw=first,
            beside=(f"{path}head",),
        )

    def _junctions(self, block: str) -> tuple[Junction, Junction]:
        q, k, v, o = (f"{block}.self_attn.{path}" for path in PARTS.values())
        activation = self.config.get("hidden_act") or ACTIVATIONS[self.name.partition("_")[0]]
        mlp = Mlp(f"{block}.mlp.fc1", f"{block}.mlp.fc2", activation)
        return (
            Junction(f"{block}.layer_norm1", (q, k, v), (o,)),
            Junction(f"{block}.layer_norm2", (mlp.up,), (mlp.down,), mlp),
        )

    def _entry(self, name: str) -> int:
        return self.config.get(name) or DEFAULTS[self.name][name]


class Clip(Compound):
    """Both towers of model_type "clip" and "siglip", the text's layers first, or the one that a model has."""

    names = ("clip", "siglip")
    unsliced = UNSLICED

    def __init__(self, config: dict):
        """Old files say some of a tower in ``text_config_dict`` and ``vision_config_dict``, which go before."""
        for tower in TOWERS:
            entry = _entry_of(tower)
            if given := config.get(f"{entry}_dict"):
                config = {**config, entry: {**(config.get(entry) or {}), **given}}
        super().__init__(config)

    @property
    def anchor(self) -> str:
        return f"{self._towers()[0]}_model.{Tower.anchor}"

    @property
    def divided(self) -> str | None:
        return "one of its towers reads text, the other images" if len(self._towers()) > 1 else None

    def check(self) -> None:
        if not self._towers():
            raise ValueError("text_config, vision_config: expected the config of a tower, got none")
        super().check()

    def named(self, names: Iterable[str]) -> Family:
        names = list(names)
        there = [
            tower for tower in TOWERS if any(name.endswith(f"{tower}_model.{Tower.anchor}") for name in names)
        ]
        if not there or there == self._towers():
            return self
        others = {name: entry for name, entry in self.config.items() if name not in map(_entry_of, TOWERS)}
        return Clip(others | {_entry_of(tower): self.config.get(_entry_of(tower)) or {} for tower in there})

    def inside(self, modules: dict[str, dict]) -> dict[str, dict[str, dict]]:
        parts = {}
        for tower in self._towers():
            path = f"{tower}_model."
            parts[_entry_of(tower)] = {
                name.removeprefix(path): spec for name, spec in modules.items() if name.startswith(path)
            }
        return parts

    def places(self) -> list[Place]:
        places = []
        for tower in self._towers():
            kind = f"{self.name}_{tower}_model"
            part = Tower({**self.config[_entry_of(tower)], "model_type": kind})
            places += [Place(f"{tower}_model.", part, layer) for layer in range(part.layers)]
        return places

    def streams(self) -> tuple[Stream, ...]:
        """One a tower. A classifier of SigLIP's images reads the last norm past the pooling."""
        parts = {place.path: place.part for place in self.places()}
        pools = self.name == "clip" or len(parts) > 1
        return tuple(part.tower(path, HEADS[part.name] if pools else None) for path, part in parts.items())

    def _towers(self) -> list[str]:
        return [tower for tower in TOWERS if self.config.get(_entry_of(tower)) is not None]


def _entry_of(tower: str) -> str:
    return f"{tower}_config"
