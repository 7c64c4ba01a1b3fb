"""The step of ``fuse`` that gives a model our attention, and takes it away again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gaugekit.hf.attention import interface, neutreno, probe


@dataclass
class AttentionStep:
    """The model attends through ``gaugekit.shaped_attention``; above the first layer with λ (V⁰ − V), where λ is given.

    ``apply`` remembers here, as plain data, what the model was before; ``undo`` puts it back.
    """

    lam: float | Sequence[float] | None = None
    attentions: dict[str, Any] = field(default_factory=dict)
    taps: list[str] = field(default_factory=list)
    shares: bool = False
    quantization_config: Any = None

    def apply(self, model: nn.Module) -> dict[str, list]:
        """Returns what the report says: ``left`` [{module, reason}], what stayed as it was. ValueError where λ is not
        finite or not one a layer.
        """
        return {"left": [{"module": "", "reason": reason} for reason in self._apply(model)]}

    def _apply(self, model: nn.Module) -> list[str]:
        if self.lam is not None:
            try:
                neutreno.check(model.config)
            except ValueError as reason:
                return [str(reason)]
            self.lam = neutreno.numbers(model.config, self.lam)
            self.quantization_config = getattr(model.config, "quantization_config", None)
        attentions = _implementations(model.config)
        if reason := probe.adopt(model):
            return [f"attention: {reason}"]
        self.attentions, self.taps = attentions, interface.add_taps(model)
        if self.lam is None:
            return []
        neutreno.attach(model, self.lam)
        self.shares = True
        try:
            model.config.quantization_config = neutreno.stored(self.quantization_config, self.lam)
        except ValueError as reason:
            return [str(reason)]
        return []

    def changed(self, model: nn.Module) -> bool:
        """Whether there is anything to undo."""
        return self.shares or (
            bool(self.attentions) and self.attentions[""] != model.config._attn_implementation
        )

    def undo(self, model: nn.Module) -> list[str]:
        """Puts back the attention; no module is exchanged, so none is named."""
        interface.remove_taps(model, self.taps)
        if self.shares:
            neutreno.detach(model)
            if self.quantization_config is None:
                model.config.__dict__.pop("quantization_config", None)
            else:
                model.config.quantization_config = self.quantization_config
        if self.attentions[""] != model.config._attn_implementation:
            model.set_attn_implementation(self.attentions)
        return []


def _implementations(config: Any, above: str | None = None) -> dict[str, Any]:
    """The implementation of a config and of those within, as ``set_attn_implementation`` takes them.

    Of a part that this model lacks (the text of a CLIP that classifies images) it is that of the whole: it has none.
    """
    own = config._attn_implementation or above
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    return {"": own} | {name: _implementations(part, own) for name, part in parts.items()}
