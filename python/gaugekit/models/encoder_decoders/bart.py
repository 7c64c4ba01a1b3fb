"""BART and its kin: separate nn.Linear projections under <stack>.layers.<l>.self_attn and encoder_attn."""

from __future__ import annotations

from gaugekit.models.encoder_decoders.stacks import COPIES, EncoderDecoder, Stack
from gaugekit.models.family import Read
from gaugekit.models.stream import Exchange, Junction, Mlp, Stream
from gaugekit.models.view import AttentionView

NAMES = (
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "blenderbot",
    "blenderbot-small",
    "m2m_100",
    "plbart",
    "whisper",
)
UNBIASED = {"whisper": "k"}  # the parts without a bias
POST_NORM = ("bart", "marian", "blenderbot-small", "plbart")  # after the sum, on the stream itself
GELU = "a GELU stands before the encoder's stream, which no rotation passes"
COMPUTED = ("m2m_100",)  # positions
PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


class BartStack(Stack):
    """BART's attention of one kind."""

    names = NAMES

    def check(self) -> None:
        if self.size % self.heads("q"):
            expected = f"a multiple of {self.side}_attention_heads={self.heads('q')}"
            raise ValueError(f"d_model: expected {expected}, got {self.size}")

    @property
    def layers(self) -> int:
        return self.config[f"{self.side}_layers"]

    @property
    def head_width(self) -> int:
        return self.size // self.heads("q")

    def heads(self, part: str) -> int:
        return self.config[f"{self.side}_attention_heads"]

    def biased(self, part: str) -> bool:
        return part not in UNBIASED.get(self.name, "")

    def block(self, layer: int) -> str:
        return f"{self.side}.layers.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        attention = "encoder_attn" if self.kind == "cross" else "self_attn"
        return {part: f"{self.block(layer)}.{attention}.{path}" for part, path in PARTS.items()}

    def attention(self, layer: int, read: Read) -> AttentionView:
        return AttentionView(
            **self.parts(layer, read),
            scale=self.head_width**-0.5,
            causal=self.kind == "decoder",
            cross=self.kind == "cross",
        )

    def junctions(self, layer: int) -> tuple[Junction, ...]:
        block, paths = self.block(layer), self.projections(layer)
        cross = self.kind == "cross"
        readers = tuple(paths[part] for part in ("q" if cross else "qkv"))
        keys = () if cross or self.biased("k") else (paths["k"],)
        norm = f"{block}.{'encoder_attn' if cross else 'self_attn'}_layer_norm"
        attention = Junction(norm, readers, (paths["o"],), keys=keys)
        mlp = Mlp(f"{block}.fc1", f"{block}.fc2", self.config.get("activation_function", "gelu"))
        if self.kind == "decoder":
            return (attention,)
        return (attention, Junction(f"{block}.final_layer_norm", (mlp.up,), (mlp.down,), mlp))


class Bart(EncoderDecoder):
    """Encoder-decoders of the model types in ``NAMES``, and their encoders alone."""

    names = NAMES
    anchor = "encoder.layers.0.self_attn.out_proj.weight"
    stack = BartStack

    def streams(self) -> tuple[Stream, ...]:
        if self.name in POST_NORM:
            raise ValueError(
                f"model_type: {self.name!r} models put their norms on the stream itself, after the sum: no gain can "
                "leave them, and no rotation passes them"
            )
        if self.name != "whisper":
            return (self._joint_stream(),) if self.decodes else super().streams()
        if self.decodes:
            return self._stream("encoder"), self._stream("decoder")
        if self.config.get("use_weighted_layer_sum"):
            raise ValueError(
                "use_weighted_layer_sum: expected false, got true: its head reads the stream at every layer"
            )
        return (self._stream("encoder"),)

    def _stream(self, side: str) -> Stream:
        """Whisper's encoder's stream, whose end the decoder reads where there is one, or its decoder's."""
        encodes, norm = side == "encoder", f"{side}.layer_norm"
        memory = (self.memory(norm),) if encodes and self.decodes else ()
        return Stream(
            size=self.config["d_model"],
            junctions=(*self.junctions(*(("encoder",) if encodes else ("decoder", "cross"))), *memory),
            tokens=None if encodes else "decoder.embed_tokens",
            positions=f"{side}.embed_positions",
            norm=None if memory else norm,
            head=None if memory else "projector" if encodes else "proj_out",
            tied=not encodes and bool(self.config.get("tie_word_embeddings", True)),
            eps=1e-5,  # torch's own for a LayerNorm
            centred=True,
            unturned=GELU if encodes else None,
            beside=("encoder.conv1", "encoder.conv2"),
        )

    def _joint_stream(self) -> Stream:
        """One: the encoder's and the decoder's begin in the same table. mBART's go through a norm before the blocks."""
        sides = ("encoder", "decoder")
        tables = () if self.name in COMPUTED else tuple(f"{side}.embed_positions.weight" for side in sides)
        # A constant goes from positions to tokens as it is only where tokens are added as they stand.
        constants = bool(tables) and not self.config.get("scale_embedding")
        tied = bool(self.config.get("tie_word_embeddings", True))
        return Stream(
            size=self.config["d_model"],
            junctions=(
                *self.junctions("encoder"),
                self.memory("encoder.layer_norm"),
                *self.junctions("decoder", "cross"),
            ),
            tokens="shared",
            positions=None,
            norm="decoder.layer_norm",
            head="lm_head",
            tied=tied,
            eps=1e-5,
            centred=True,
            tables=tables,
            entries=tuple(f"{side}.layernorm_embedding" for side in sides) if self.name == "mbart" else (),
            exchanges=(Exchange(tables, "shared.weight"),) if constants else (),
            unturned=None if tables else "its positions are sines that no tensor holds",
            copies=COPIES if tied else (),  # else each side has a table of its own
            beside=("final_logits_bias",),
        )
