"""T5: separate nn.Linear projections without biases under <stack>.block.<l>.layer.<n>.<kind>Attention."""

from __future__ import annotations

from gaugekit.models.encoder_decoders.stacks import COPIES, EncoderDecoder, Stack
from gaugekit.models.family import Read
from gaugekit.models.stream import Junction, Mlp, Stream
from gaugekit.models.view import AttentionView

NAMES = ("t5", "mt5", "umt5")
ACTIVATIONS = {"t5": "relu"}  # where the config does not say; mT5 and UMT5 have gates


class T5Stack(Stack):
    """T5's attention of one kind; self-attention adds a bias of position to its scores, which no view knows of."""

    names = NAMES

    def check(self) -> None:
        for entry in ("d_model", "d_kv", "num_heads", "num_layers"):
            if self.config[entry] < 1:
                raise ValueError(f"{entry}: expected a positive number, got {self.config[entry]}")

    @property
    def layers(self) -> int:
        layers = self.config["num_layers"]
        return layers if self.side == "encoder" else self.config.get("num_decoder_layers") or layers

    @property
    def head_width(self) -> int:
        return self.config["d_kv"]

    def heads(self, part: str) -> int:
        return self.config["num_heads"]

    def biased(self, part: str) -> bool:
        return False

    def block(self, layer: int) -> str:
        return f"{self.side}.block.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        attention = "layer.1.EncDecAttention" if self.kind == "cross" else "layer.0.SelfAttention"
        return {part: f"{self.block(layer)}.{attention}.{part}" for part in "qkvo"}

    def attention(self, layer: int, read: Read) -> AttentionView:
        shared = self.name != "umt5" and self.kind != "cross"  # UMT5 has a table for each layer
        return AttentionView(
            **self.parts(layer, read),
            scale=1.0,
            causal=self.kind == "decoder",
            cross=self.kind == "cross",
            shared_bias=f"{self.block(0)}.layer.0.SelfAttention.relative_attention_bias" if shared else None,
        )

    def junctions(self, layer: int) -> tuple[Junction, ...]:
        """Those of a block, its MLP behind the last of its attentions."""
        q, k, v, o = self.projections(layer).values()
        norm = q.rpartition(".")[0].rpartition(".")[0] + ".layer_norm"
        if self.kind == "decoder":
            return (Junction(norm, (q, k, v), (o,)),)
        mlp, place = self._mlp(layer), 2 if self.kind == "cross" else 1
        readers = (q,) if self.kind == "cross" else (q, k, v)
        ways = (mlp.gate, mlp.up) if mlp.gate else (mlp.up,)
        return (
            Junction(norm, readers, (o,)),
            Junction(f"{self.block(layer)}.layer.{place}.layer_norm", ways, (mlp.down,), mlp),
        )

    def _mlp(self, layer: int) -> Mlp:
        place = 2 if self.kind == "cross" else 1
        path = f"{self.block(layer)}.layer.{place}.DenseReluDense"
        kind = self.config.get("feed_forward_proj") or ACTIVATIONS.get(self.name, "gated-gelu")
        gated, activation = kind.startswith("gated"), kind.rpartition("-")[2]
        up, gate = (f"{path}.wi_1", f"{path}.wi_0") if gated else (f"{path}.wi", None)
        return Mlp(up, f"{path}.wo", activation, gate)


class T5(EncoderDecoder):
    """Encoder-decoders of model_type "t5", "mt5" and "umt5", and their encoders alone."""

    names = NAMES
    anchor = "encoder.block.0.layer.0.SelfAttention.o.weight"
    stack = T5Stack

    @property
    def unstreamed(self) -> str | None:
        if self.name == "umt5":
            return self.divided
        return self.divided or "its first block hands the bias of position on to the others"

    def streams(self) -> tuple[Stream, ...]:
        """One: the encoder's and the decoder's begin in the same table, so that no one basis changes alone."""
        last = "encoder.final_layer_norm"
        decoder = (self.memory(last), *self.junctions("decoder", "cross")) if self.decodes else ()
        return (
            Stream(
                size=self.config["d_model"],
                junctions=(*self.junctions("encoder"), *decoder),
                tokens="shared",
                positions=None,
                norm="decoder.final_layer_norm" if self.decodes else last,
                head="lm_head",
                tied=bool(self.config.get("tie_word_embeddings", True)),
                eps=self.config.get("layer_norm_epsilon", 1e-6),
                centred=False,
                copies=COPIES,
                beside=tuple(
                    f"{place.part.block(place.layer)}.layer.0.SelfAttention.relative_attention_bias"
                    for place in self.places()
                ),
            ),
        )
