"""The config of SAS models, and the layer of a transformers cache in which they decode."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gaugekit.hf import parallel
from gaugekit.hf.upstream import unfit

try:
    from huggingface_hub.dataclasses import strict
    from transformers import PreTrainedConfig
except ImportError as error:
    raise unfit(__name__, error) from error

from gaugekit.hf.cache.layers import GrowingLayer
from gaugekit.nn import PreLNBlock, SASBlock, SASPBlock, SkiplessBlock
from gaugekit.nn.block import Block
from gaugekit.nn.mlp import GATED

BLOCKS = {"sas": SASBlock, "sas_p": SASPBlock, "skipless": SkiplessBlock, "pre_ln": PreLNBlock}
WITHOUT_NORM = ("sas_p", "skipless")


@strict
class SASConfig(PreTrainedConfig):
    """Sizes and kind of a SAS model; the defaults are the paper's 18-layer GPT.

    ``block`` is "sas" (no skip around attention), "sas_p" (attention and MLP side by side, no skip; ``norm`` may be
    "none"), "skipless" (the MLP after the attention, no skip; ``norm`` may be "none") or "pre_ln" (the standard
    block, to compare with); ``norm`` "rms" or "layer"; ``hidden_act`` one of relu, gelu, geglu, swiglu; ``rope``
    turns queries and keys by position, else sinusoids are added to the embeddings (as large as those are at the
    start). ``num_key_value_heads`` groups share keys, ``key_width`` is the width of a query, ``sliding_window`` the
    number of keys a query sees. ``beta_ff``, where each block's MLP starts, is 0.1·√(18/L) unless given.
    ``first_value`` keeps the value matrix of the first layer; ``values`` and ``outputs`` give every layer a value
    and an output matrix; without ``queries`` or ``keys`` only the first layer has that matrix, and in the others
    the input itself is the query or the key. ``causal`` None is left to the head: True for SASModel and
    SASForCausalLM, False for SASForMaskedLM. n_layer, n_head and n_embd are understood as well. Raises ValueError
    for values that do not fit.
    """

    model_type = "gaugekit_sas"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "activation": "hidden_act",
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 18
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    key_width: int | None = None
    intermediate_size: int | None = None
    block: str = "sas"
    norm: str = "rms"
    norm_eps: float = 1e-8
    hidden_act: str = "relu"
    rope: bool = False
    rope_base: float = 10_000.0
    sliding_window: int | None = None
    beta_ff: float | None = None
    first_value: bool = True
    values: bool = False
    outputs: bool = False
    queries: bool = True
    keys: bool = True
    causal: bool | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        layers = len(self.layer_types)
        if self.block not in BLOCKS:
            raise ValueError(f"block: expected one of {', '.join(BLOCKS)}; got {self.block!r}")
        if self.norm == "none" and self.block not in WITHOUT_NORM:
            raise ValueError(f'norm: expected "rms" or "layer" for block {self.block!r}, got "none"')
        if self.block == "pre_ln" and (self.values, self.outputs, self.queries, self.keys) != (
            False,
            False,
            True,
            True,
        ):
            raise ValueError("values, outputs, queries, keys: expected their defaults for block 'pre_ln'")
        if self.num_key_value_heads is None:  # servers look it up, and want a number
            self.num_key_value_heads = self.num_attention_heads
        if self.beta_ff is None:
            self.beta_ff = 0.1 * math.sqrt(18 / layers)
        for layer in {0, layers - 1}:
            self.block_of(layer, device="meta")  # the modules check the rest

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """How transformers cuts the model among ranks: by heads; not at all where it lacks our styles."""
        if parallel.ALL_PARALLEL_STYLES is None:
            return None
        standard = self.block == "pre_ln"
        return parallel.plan_of_blocks(
            value=self.first_value or self.values or standard,
            output=self.outputs or standard,
            gated=self.hidden_act in GATED,
        )

    @property
    def layer_types(self) -> list[str]:
        """Which cache layer each layer wants, as DynamicCache asks for it."""
        if not isinstance(self.num_hidden_layers, int) or self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers: expected at least 1, got {self.num_hidden_layers!r}")
        return [SASCacheLayer._layer_type] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Ours is not on transformers' list of types."""

    def block_of(self, layer: int, device: torch.device | str | None = None) -> Block:
        """A new block for this layer."""
        options: dict[str, Any] = {"first": self.first_value and layer == 0}
        if self.block != "skipless":
            options["beta_ff"] = self.beta_ff
        for name, given in (("value", self.values), ("output", self.outputs)):
            if given:
                options[name] = nn.Linear(self.hidden_size, self.hidden_size, bias=False, device=device)
        options |= {"query": self.queries or layer == 0, "key": self.keys or layer == 0}
        return BLOCKS[self.block](
            self.hidden_size,
            self.num_attention_heads,
            groups=self.num_key_value_heads,
            key_width=self.key_width,
            hidden=self.intermediate_size,
            norm=self.norm,
            eps=self.norm_eps,
            activation=self.hidden_act,
            std=self.initializer_range,
            causal=self.causal is not False,
            window=self.sliding_window,
            rotary_base=self.rope_base if self.rope else None,
            device=device,
            **({} if self.block == "pre_ln" else options),
        )


class SASCacheLayer(GrowingLayer):
    """A layer of DynamicCache(config=...) for a block of a SAS model."""

    _layer_type = "gaugekit_sas"
