"""Transformers models made of the blocks that train without value and output matrices.

``SASConfig``, ``SASModel``, ``SASForCausalLM`` and ``SASForMaskedLM``; importing ``gaugekit.integrations.transformers``
registers them with the Auto classes. He and Hofmann, Simplifying Transformer Blocks (ICLR 2024).
"""

from __future__ import annotations

import copy
import functools
import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from ..nn import MLP, IdentityLinear, LayerCache, PreLNBlock, SASBlock, SASPBlock, ShapedAttention
from ..nn.block import Block, make_norm
from ..nn.rows import positions_of

BLOCKS = {"sas": SASBlock, "sas_p": SASPBlock, "pre_ln": PreLNBlock}


@strict
class SASConfig(PreTrainedConfig):
    """Sizes and kind of a SAS model; the defaults are the paper's 18-layer GPT.

    ``block`` is "sas" (no skip around attention), "sas_p" (attention and MLP side by side, no skip; ``norm`` may be
    "none") or "pre_ln" (the standard block, to compare with); ``norm`` "rms" or "layer"; ``hidden_act`` one of relu,
    gelu, geglu, swiglu; ``rope`` turns queries and keys by position, else sinusoids are added to the embeddings (as
    large as those are at the start). ``num_key_value_heads`` groups share keys, ``key_width`` is the width of a query,
    ``sliding_window`` the number of keys a query sees. ``beta_ff``, where each block's MLP starts, is 0.1·√(18/L)
    unless given; ``first_value`` keeps the value matrix of the first layer. ``causal`` None is left to the head:
    True for SASModel and SASForCausalLM, False for SASForMaskedLM. n_layer, n_head and n_embd are understood as well.
    Raises ValueError for values that do not fit.
    """

    model_type = "gaugekit_sas"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the base class reads it from the class)
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
        if self.norm == "none" and self.block != "sas_p":
            raise ValueError(f'norm: expected "rms" or "layer" for block {self.block!r}, got "none"')
        if self.beta_ff is None:
            self.beta_ff = 0.1 * math.sqrt(18 / layers)
        self.block_of(0, device="meta")  # the modules check the rest

    @property
    def layer_types(self) -> list[str]:
        """Which cache layer each layer wants, as DynamicCache asks for it."""
        if not isinstance(self.num_hidden_layers, int) or self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers: expected at least 1, got {self.num_hidden_layers!r}")
        return [SASCacheLayer._layer_type] * self.num_hidden_layers

    def validate_layer_type(self):
        """Ours is not on transformers' list of types."""

    def block_of(self, layer: int, device=None) -> Block:
        """A new block for this layer."""
        options = {"beta_ff": self.beta_ff, "first": self.first_value and layer == 0}
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


class SASCacheLayer(LayerCache, CacheLayerMixin):
    """A layer of DynamicCache(config=...): keys, values, lengths and the running sum of a LayerCache."""

    _layer_type = "gaugekit_sas"
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, **_):
        LayerCache.__init__(self)

    @property
    def is_initialized(self) -> bool:
        return self.keys is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.keys is None else self.keys.shape[0]

    def lazy_initialization(self, *_) -> None:
        """The first append does it."""

    def update(self, key_states, value_states, *args, **kwargs):
        step = self.append(key_states, value_states)
        return step.keys, step.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        LayerCache.__init__(self)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a negative number or 0, got {tokens_to_remove}")
        if self.columns and tokens_to_remove:
            LayerCache.crop(self, -tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.select(rows.repeat_interleave(repeats))


class SASPreTrainedModel(PreTrainedModel):
    """Attention is gaugekit's own operator, so none of transformers' implementations can be asked for."""

    config_class = SASConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [cls.__name__ for cls in BLOCKS.values()]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (ShapedAttention, Block, MLP, IdentityLinear)):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class SASModel(SASPreTrainedModel):
    """Embeddings, blocks and a last norm.

    Rows that ``attention_mask`` [B, past + T] hides may stand anywhere: inside, every sequence is pushed to the front
    (right padding) and its rows are put back in place at the end.
    """

    def __init__(self, config: SASConfig):
        super().__init__(config)
        make = functools.partial(make_norm, width=config.hidden_size, eps=config.norm_eps)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_norm = make("layer" if config.norm == "none" else "none")
        self.layers = nn.ModuleList(config.block_of(layer) for layer in range(config.num_hidden_layers))
        self.norm = make("rms" if config.norm == "none" else config.norm)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None, use_cache: bool | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, **kwargs,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        if output_attentions:
            raise ValueError("output_attentions: expected False, since no array of queries × keys is made")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        causal = self.config.causal is not False
        if use_cache is None:
            use_cache = self.config.use_cache and causal and not self.training
        if use_cache and past_key_values is None and causal:
            past_key_values = DynamicCache(config=self.config)
        layers = _cache_layers(past_key_values, len(self.layers))
        packed = _Packed.of(attention_mask, x, 0 if layers[0] is None else layers[0].columns)
        lengths = None if packed is None else packed.lengths
        if position_ids is None:
            positions = positions_of(x.shape[1], layers[0], x.device)
        else:
            positions = position_ids if packed is None else packed.pack(position_ids.expand(x.shape[:2]))
        x = x if packed is None else packed.pack(x)
        if not self.config.rope:
            x = x + self.config.initializer_range * math.sqrt(2) * sinusoids(positions, x)
        x = self.embed_norm(x)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [x] if wanted else []
        for block, cache in zip(self.layers, layers, strict=True):
            run = functools.partial(block, lengths=lengths, cache=cache, positions=positions)
            if self.gradient_checkpointing and self.training and cache is None:
                run = functools.partial(self._gradient_checkpointing_func, run)
            x = run(x)
            if wanted:
                states.append(x)
        x = self.norm(x)
        states[-1:] = [x] if wanted else []
        if packed is not None:
            x, states = packed.unpack(x), [packed.unpack(state) for state in states]
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if wanted else None,
        )


class _Packed:
    """Sequences pushed to the front of their rows: ``lengths`` [B], and the way there and back."""

    def __init__(self, real: Tensor):
        self.lengths = real.sum(1)
        self.order = (~real).long().argsort(dim=1, stable=True)
        self.place = self.order.argsort(dim=1)

    @classmethod
    def of(cls, attention_mask: Tensor | None, x: Tensor, past: int) -> _Packed | None:
        """None where nothing is hidden (under torch.compile, which cannot ask, where there is no mask)."""
        if attention_mask is None:
            return None
        if attention_mask.shape != (x.shape[0], past + x.shape[1]):
            expected, given = [x.shape[0], past + x.shape[1]], list(attention_mask.shape)
            raise ValueError(f"attention_mask: expected [B, past + T] = {expected}, got {given}")
        real = attention_mask[:, past:].bool()
        if not torch.compiler.is_compiling() and bool(real.all()):
            return None
        return cls(real)

    def pack(self, x: Tensor) -> Tensor:
        return _rows(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        return _rows(x, self.place)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, t]] for x [B, T] or [B, T, D]."""
    return x.gather(1, index if x.dim() == 2 else index[..., None].expand_as(x))


def _cache_layers(cache: Cache | None, count: int) -> list[SASCacheLayer | None]:
    if cache is None:
        return [None] * count
    layers = getattr(cache, "layers", ())
    if len(layers) != count or not all(isinstance(layer, SASCacheLayer) for layer in layers):
        raise ValueError(f"past_key_values: expected DynamicCache(config=model.config), got {cache!r}")
    return list(layers)


def sinusoids(positions: Tensor, like: Tensor) -> Tensor:
    """sin and cos of position · 10000^(−2i/D), as wide as ``like`` [..., D] and of its dtype: [T or B, T, D]."""
    width = like.shape[-1]
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, device=like.device) / width)
    angle = positions[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :width].to(like.dtype)


def _with_causal(config: SASConfig, causal: bool, head: str) -> SASConfig:
    if config.causal is not None and config.causal != causal:
        raise ValueError(f"causal: expected {causal} or None for {head}, got {config.causal}")
    config = copy.deepcopy(config)
    config.causal = causal
    return config


class SASForCausalLM(SASPreTrainedModel, GenerationMixin):
    """A language model: the next token from those before it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SASConfig):
        config = _with_causal(config, True, "SASForCausalLM")
        super().__init__(config)
        self.model = SASModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, **kwargs,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """With ``labels`` [B, T] (input_ids themselves; −100 is passed over) the output holds the mean loss."""
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )

    def _prepare_cache_for_generation(self, generation_config, *args, **kwargs):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f'cache_implementation: expected None or "dynamic", got {kind!r}')
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)


class SASForMaskedLM(SASPreTrainedModel):
    """A masked language model: hidden tokens from those around them."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SASConfig):
        config = _with_causal(config, False, "SASForMaskedLM")
        super().__init__(config)
        self.model = SASModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None, **kwargs,
    ) -> MaskedLMOutput:  # fmt: skip
        """With ``labels`` [B, T] (−100 where nothing was hidden) the output holds the mean loss."""
        out = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        logits = self.lm_head(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


def register() -> None:
    """Lets AutoConfig, AutoModel, AutoModelForCausalLM and AutoModelForMaskedLM find these classes."""
    AutoConfig.register(SASConfig.model_type, SASConfig, exist_ok=True)
    AutoModel.register(SASConfig, SASModel, exist_ok=True)
    AutoModelForCausalLM.register(SASConfig, SASForCausalLM, exist_ok=True)
    AutoModelForMaskedLM.register(SASConfig, SASForMaskedLM, exist_ok=True)
