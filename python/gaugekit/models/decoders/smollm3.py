"""SmolLM3: Llama, but in some layers no channel turns, and there nothing stands between queries and keys."""

from __future__ import annotations

from gaugekit.models.decoders.llama import Llama


class SmolLm3(Llama):
    """Decoders of model_type "smollm3"."""

    names = ("smollm3",)
    base = 2_000_000.0

    def check(self) -> None:
        super().check()
        self.refuse_short("no_rope_layers")

    def rotary(self, layer: int) -> int:
        turning = self.config.get("no_rope_layers")  # the name notwithstanding, 1 is a layer that turns
        every = self.config.get("no_rope_layer_interval", 4)
        turns = turning[layer] if turning else (layer + 1) % every != 0
        return self.head_width if turns else 0
