"""NeuTRENO for transformers models that attend through "gaugekit": softmax(Q Kᵀ) V + λ (V⁰ − V) above the first layer.

``attach`` hangs two hooks on a base model. Before each forward they add one argument, a fresh ``SharedValues``, which
transformers hands down to every attention: the first leaves its values there, the others read them. It belongs to that
forward alone, so gradient checkpointing finds it again and nothing outlives a call. V⁰ is that of the tokens of the
call: a cache holds nothing more than before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.checkpoint.version import VERSION

NAME = "gaugekit"
ARGUMENT = "gaugekit_values"
FAMILIES = ("bert", "deit", "gpt2", "llama", "mistral", "qwen2", "roberta", "vit")


class SharedValues:
    """The first layer's values V⁰ [B, G, T, V] of one forward, and λ: one number, or one for each layer."""

    def __init__(self, lam: float | Sequence[float]):
        self.lam, self.v0, self.order, self.recorded = lam, None, {}, True

    def of(self, module: nn.Module, value: Tensor, own: Tensor, heads: int) -> dict[str, Tensor]:
        """``v0`` and ``lam`` for the attention of ``module``: {} for the first, whose ``own`` values are kept."""
        index = self.order.setdefault(id(module), len(self.order))
        if index == 0:
            if self.v0 is None:
                self.v0, self.recorded = own, torch.is_grad_enabled()
            return {}
        if torch.is_grad_enabled() and not self.recorded:
            raise ValueError(
                "use_reentrant: expected False for gradient checkpointing with neutreno, got True, which loses the "
                "gradient of the first layer's values"
            )
        lam = self.lam if isinstance(self.lam, (int, float)) else self.lam[index]
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        gain = torch.full((heads,), float(lam), dtype=dtype, device=value.device)
        return {"v0": self.v0.to(value.device, value.dtype), "lam": gain}


class _Share:
    """The hook before a forward: a class of its own, so that it is found again and copied with the model."""

    def __init__(self, lam: float | Sequence[float]):
        self.lam = lam

    def __call__(self, module: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        return arguments, {**named, ARGUMENT: SharedValues(self.lam)}


class _Arrived:
    """The hook after a forward: ValueError where the attentions never saw the shared values."""

    def __call__(self, module: nn.Module, arguments: tuple, named: dict, output) -> None:
        if not named[ARGUMENT].order:
            raise ValueError(
                f"neutreno: expected the attentions of {type(module).__name__} to get {ARGUMENT}, but none did; is "
                "attn_implementation still 'gaugekit'?"
            )


def check(config: Any) -> None:
    """ValueError, with the reason, for a model whose attentions this was not tried with."""
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"neutreno: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if getattr(config, "add_cross_attention", False) or getattr(config, "is_encoder_decoder", False):
        raise ValueError("neutreno: expected no cross-attention, whose values are another model's")


def numbers(config: Any, lam: float | Sequence[float]) -> float | list[float]:
    """λ as given, checked: a finite number, or as many as there are layers. ValueError otherwise."""
    single = isinstance(lam, (int, float)) and not isinstance(lam, bool)
    numbers_given = [lam] if single or isinstance(lam, (bool, str)) else list(lam)
    if any(
        isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) for x in numbers_given
    ):
        raise ValueError(f"neutreno: expected a finite number or one a layer, got {lam!r}")
    if not single and len(numbers_given) != config.num_hidden_layers:
        raise ValueError(
            f"neutreno: expected {config.num_hidden_layers} numbers, one a layer, got {len(numbers_given)}"
        )
    return lam if single else numbers_given


def stored(existing: Any, lam: float | Sequence[float]) -> dict:
    """``existing``, the model's quantization_config, with λ: what config.json says of a fused model.

    ValueError where the weights are stored in a way that is not ours.
    """
    stored_as = {} if existing is None else existing if isinstance(existing, dict) else existing.to_dict()
    method = stored_as.get("quant_method", NAME)
    if method != NAME:
        raise ValueError(
            f"neutreno: λ will not be saved with the model, whose weights are stored as {method!r}"
        )
    return {"quant_method": NAME, "version": VERSION, "modules": {}} | stored_as | {"neutreno": lam}


def attach(model: nn.Module, lam: float | Sequence[float]) -> None:
    base = model.base_model
    base.register_forward_pre_hook(_Share(lam), with_kwargs=True)
    base.register_forward_hook(_Arrived(), with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Takes the hooks of ``attach`` off."""
    base = model.base_model
    for hooks, flags, kind in (
        (base._forward_pre_hooks, base._forward_pre_hooks_with_kwargs, _Share),
        (base._forward_hooks, base._forward_hooks_with_kwargs, _Arrived),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            flags.pop(key, None)
