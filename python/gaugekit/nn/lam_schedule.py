"""λ of a NeuTRENO model as a function of the training step."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gaugekit.nn.neutreno_attention import NeutrenoAttention


class LamSchedule:
    """Sets λ of every NeutrenoAttention in ``model`` to the number ``lam(step)``, now and after each ``step()``.

    λ is a buffer written in place: compiled code sees it, and checkpoints hold it. ValueError where there is none, or
    where λ is trained.
    """

    def __init__(self, model: nn.Module, lam: Callable[[int], float]):
        self.attentions = [m for m in model.modules() if isinstance(m, NeutrenoAttention)]
        if not self.attentions or any(isinstance(m.lam, nn.Parameter) for m in self.attentions):
            raise ValueError(
                "model: expected NeutrenoAttention whose λ is not trained, got none or a trained one"
            )
        self.lam, self.count = lam, -1
        self.step()

    def step(self) -> None:
        self.count += 1
        for attention in self.attentions:
            attention.lam.fill_(self.lam(self.count))

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"] - 1
        self.step()
