"""GPT-BigCode (StarCoder, SantaCoder): GPT-2's names, nn.Linear modules, one key for all heads or one a head."""

from __future__ import annotations

from gaugekit.models.decoders.gpt2 import Gpt2
from gaugekit.models.family import Family, Read
from gaugekit.models.stream import Stream
from gaugekit.models.view import AttentionView


class GptBigCode(Gpt2):
    """Decoders of model_type "gpt_bigcode"."""

    names = ("gpt_bigcode",)
    transposed = False

    def heads(self, part: str) -> int:
        return 1 if part in "kv" and self._shared else super().heads(part)

    @property
    def groups(self) -> int:
        return 1 if self._shared else self.heads("k")

    def attention(self, layer: int, read: Read) -> AttentionView:
        scale = self.head_width**-0.5 if self.config.get("scale_attn_weights", True) else 1.0
        return AttentionView(**self.parts(layer, read), scale=scale, causal=True)

    def stream(self) -> Stream:
        return Family.stream(self)  # nobody has tried it

    @property
    def _shared(self) -> bool:
        return bool(self.config.get("multi_query", True))
