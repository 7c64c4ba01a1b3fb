"""ViT, DeiT and DINOv2: separate nn.Linear projections, no mask; named in files otherwise than in memory."""

from __future__ import annotations

from collections.abc import Iterable

from gaugekit.models.family import Family, Read
from gaugekit.models.linears import Linears
from gaugekit.models.stream import Exchange, Junction, Mlp, Part, Stream
from gaugekit.models.view import AttentionView

NAMES = ("vit", "deit", "dinov2", "dinov2_with_registers")
IN_FILES = {
    "q": "attention.query",
    "k": "attention.key",
    "v": "attention.value",
    "o": "output.dense",
}
TABLES = ("cls_token", "distillation_token", "register_tokens", "mask_token", "position_embeddings")
LIVE = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


class Vit(Linears):
    """Encoders of images of the model types in ``NAMES``.

    transformers renames their tensors when it reads and writes files: "encoder.layer.0.attention.attention.query" of a
    file is "layers.0.attention.q_proj" of a model ("encoder.layer.0..." of DINOv2's). ``live`` adapters go by the
    second kind of name.
    """

    names = NAMES
    unsliced = "model: its stream cannot be sliced: a calibration reads text, and what begins this stream is an image"

    def __init__(self, config: dict, live: bool = False):
        super().__init__(config)
        self.live = live

    @property
    def anchor(self) -> str:
        return f"{self.block(0)}.attention.{(LIVE if self.live else IN_FILES)['o']}.weight"

    def named(self, names: Iterable[str]) -> Family:
        other = Vit(self.config, not self.live)
        return other if any(name.endswith(other.anchor) for name in names) else self

    def check(self) -> None:
        size, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        if not self.config.get("head_dim") and size % heads:
            raise ValueError(f"hidden_size: expected a multiple of num_attention_heads={heads}, got {size}")
        self.refuse_odd_heads()

    def block(self, layer: int) -> str:
        renamed = self.live and not self.name.startswith("dinov2")
        return f"layers.{layer}" if renamed else f"encoder.layer.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        return {
            part: f"{self.block(layer)}.attention.{path}"
            for part, path in (LIVE if self.live else IN_FILES).items()
        }

    def modules(self, layer: int) -> dict[str, str]:
        return Vit(self.config, live=True).projections(layer)

    def biased(self, part: str) -> bool:
        return part == "o" or bool(self.config.get("qkv_bias", True))

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(**self.parts(layer, read), scale=self.head_width**-0.5)

    def streams(self) -> tuple[Stream, ...]:
        """Its first tokens (a class, DeiT's for distillation) and its patches have positions, registers have none."""
        if not self.config.get("apply_layernorm", True):
            raise ValueError(
                "apply_layernorm: expected true, got false: a backbone of this config shows its stream before the "
                "last norm"
            )
        positions, patches = "embeddings.position_embeddings", "embeddings.patch_embeddings.projection"
        first = ("cls_token", "distillation_token") if self.name == "deit" else ("cls_token",)
        exchanges = [
            Exchange((f"embeddings.{token}",), positions, place, place + 1)
            for place, token in enumerate(first)
        ]
        exchanges.append(Exchange((f"{patches}.bias", "embeddings.mask_token"), positions, len(first)))
        return (
            Stream(
                size=self.size,
                junctions=tuple(self._junctions(self.block(layer)) for layer in range(self.layers)),
                tokens=None,
                positions=None,
                norm="layernorm",
                head=None,
                tied=False,
                eps=self.config.get("layer_norm_eps", 1e-6 if self._scaled else 1e-12),
                centred=True,
                tables=tuple(f"embeddings.{name}" for name in TABLES),
                patches=patches,
                exchanges=tuple(exchanges),
                reads=2
                if self._scaled
                else 1,  # DINOv2's classifiers read the class token and the patches' mean
                parts=self._parts() if self._fused else {},
                beside=("pooler",),
            ),
        )

    @property
    def _scaled(self) -> bool:
        """DINOv2's: a scale a channel behind each part."""
        return self.name.startswith("dinov2")

    @property
    def _fused(self) -> bool:
        """Whether gate and up of an MLP are one matrix, as in files of DINOv2's with SwiGLU."""
        return self._scaled and not self.live and bool(self.config.get("use_swiglu_ffn"))

    def _junctions(self, block: str) -> tuple[Junction, Junction]:
        q, k, v, o = (f"{block}.attention.{path}" for path in (LIVE if self.live else IN_FILES).values())
        norms = ("norm1", "norm2") if self._scaled else ("layernorm_before", "layernorm_after")
        scales = [f"{block}.layer_scale{part}.lambda1" if self._scaled else None for part in (1, 2)]
        mlp = self._mlp(block)
        ways = (mlp.gate, mlp.up) if mlp.gate else (mlp.up,)
        return (
            Junction(f"{block}.{norms[0]}", (q, k, v), (o,), scale=scales[0]),
            Junction(f"{block}.{norms[1]}", ways, (mlp.down,), mlp, scale=scales[1]),
        )

    def _mlp(self, block: str) -> Mlp:
        activation = self.config.get("hidden_act", "gelu")
        if self._scaled and self.config.get("use_swiglu_ffn"):
            down = "down_proj" if self.live else "weights_out"
            return Mlp(f"{block}.mlp.up_proj", f"{block}.mlp.{down}", "silu", f"{block}.mlp.gate_proj")
        if self.live or self._scaled:
            return Mlp(f"{block}.mlp.fc1", f"{block}.mlp.fc2", activation)
        return Mlp(f"{block}.intermediate.dense", f"{block}.output.dense", activation)

    def _parts(self) -> dict[str, Part]:
        """Gates and ups, by their names in memory."""
        width = (int(int(self.size * self.config.get("mlp_ratio", 4)) * 2 / 3) + 7) // 8 * 8
        parts = {}
        for block in map(self.block, range(self.layers)):
            fused = f"{block}.mlp.weights_in"
            for name, first in (("gate_proj", 0), ("up_proj", width)):
                parts[f"{block}.mlp.{name}"] = Part(f"{fused}.weight", f"{fused}.bias", first, first + width)
        return parts
