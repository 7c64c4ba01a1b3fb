"""BERT and its kin: separate nn.Linear projections (weight [out, in]) under encoder.layer.<l>.attention."""

from __future__ import annotations

from gaugekit.models.family import Read
from gaugekit.models.linears import Linears
from gaugekit.models.view import POSITIONS, AttentionView

PARTS = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
OTHER_PARTS = {
    "mpnet": {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o"},
    "deberta-v2": {"q": "self.query_proj", "k": "self.key_proj", "v": "self.value_proj", "o": "output.dense"},
}
NAMES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", *OTHER_PARTS)
OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")  # the first position has number pad_token_id + 1


class Bert(Linears):
    """Encoders of the model types in ``NAMES`` (and causal decoders of those types, without cross-attention)."""

    names = NAMES

    @property
    def anchor(self) -> str:
        return f"encoder.layer.0.attention.{self._parts()['o']}.weight"

    def check(self) -> None:
        position = self.config.get("position_embedding_type") or "absolute"
        if position != "absolute" and self.name != "deberta-v2":
            raise ValueError(
                f"position_embedding_type: expected 'absolute', got {position!r} (a relative one adds position to the "
                "scores, and the key/query symmetry no longer holds)"
            )
        self.refuse_odd_heads()
        size, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        if size % heads:
            raise ValueError(f"hidden_size: expected a multiple of num_attention_heads={heads}, got {size}")

    def block(self, layer: int) -> str:
        return f"encoder.layer.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        return {part: f"{self.block(layer)}.attention.{path}" for part, path in self._parts().items()}

    def biased(self, part: str) -> bool:
        return True

    def attention(self, layer: int, read: Read) -> AttentionView:
        parts = self.parts(layer, read)
        kinds = self.config.get("pos_att_type") or () if self.name == "deberta-v2" else ()
        terms = 1 + ("c2p" in kinds) + ("p2c" in kinds)  # DeBERTa's scores are a mean over so many
        causal, scale = bool(self.config.get("is_decoder")), (self.head_width * terms) ** -0.5
        shared = "encoder.relative_attention_bias" if self.name == "mpnet" else None
        return AttentionView(**parts, scale=scale, causal=causal, barred=self._barred(), shared_bias=shared)

    def _barred(self) -> dict[str, str]:
        """DeBERTa multiplies queries and keys with vectors of position too, so that even its key bias can be seen;
        where those come of the same projections (``share_att_key``) they turn with them.
        """
        if self.name != "deberta-v2" or not (
            self.config.get("relative_attention") and self.config.get("pos_att_type")
        ):
            return {}
        groups = [] if self.config.get("share_att_key") else ["query_key"]
        if "p2c" in self.config["pos_att_type"]:  # what positions ask of keys
            groups.append("key_bias")
        return dict.fromkeys(groups, POSITIONS)

    def _parts(self) -> dict[str, str]:
        return OTHER_PARTS.get(self.name, PARTS)
