"""Transformers models made of the blocks that train without value and output matrices.

``SASConfig``, ``SASModel``, ``SASForCausalLM`` and ``SASForMaskedLM``; importing ``gaugekit.integrations.transformers``
registers them with the Auto classes. He and Hofmann, Simplifying Transformer Blocks (ICLR 2024).
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.hf.upstream import unfit

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        Cache,
        DynamicCache,
        GenerationMixin,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
    from transformers.utils import can_return_tuple
except ImportError as error:
    raise unfit(__name__, error) from error

from gaugekit.hf.cache.layers import CACHE
from gaugekit.hf.sas_config import BLOCKS, SASCacheLayer, SASConfig
from gaugekit.hf.sas_pages import Batched, Pages
from gaugekit.nn import MLP, IdentityLinear, ShapedAttention
from gaugekit.nn.block import Block, make_norm
from gaugekit.nn.cache import positions_of


class SASPreTrainedModel(PreTrainedModel):
    """Attention is gaugekit's own operator, so none of transformers' implementations can be asked for."""

    config_class = SASConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [cls.__name__ for cls in BLOCKS.values()]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012

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
        position_ids: Tensor | None = None, cache: Cache | None = None, inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, past_key_values: Cache | None = None,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """``past_key_values`` is the older name of ``cache``."""
        cache = _one_cache(cache, past_key_values)
        if output_attentions:
            raise ValueError("output_attentions: expected False, since no array of queries × keys is made")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        causal = self.config.causal is not False
        if use_cache is None:
            use_cache = self.config.use_cache and causal and not self.training
        if use_cache and cache is None and causal:
            cache = DynamicCache(config=self.config)
        layers = _cache_layers(cache, len(self.layers))
        packed = _Packed.of(attention_mask, x, 0 if layers[0] is None else layers[0].columns)
        lengths = None if packed is None else packed.lengths
        for layer in layers:
            if isinstance(layer, SASCacheLayer):
                layer.saw(None if packed is None else packed.real, x.shape[1])
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
        for block, layer in zip(self.layers, layers, strict=True):
            turned = positions if self.config.rope else None
            run = functools.partial(block, lengths=lengths, cache=layer, positions=turned)
            if self.gradient_checkpointing and self.training and layer is None:
                run = functools.partial(self._gradient_checkpointing_func, run)
            x = run(x)
            if wanted:
                states.append(x)
        x = self.norm(x)
        states[-1:] = [x] if wanted else []
        if packed is not None:
            x, states = packed.unpack(x), [packed.unpack(state) for state in states]
        states = tuple(states) if wanted else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=states, **{CACHE: cache})


class _Packed:
    """Sequences pushed to the front of their rows: ``lengths`` [B], the way there and back, and ``real`` [B, T]."""

    def __init__(self, real: Tensor):
        self.real, self.lengths = real, real.sum(1)
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


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    if cache is not None and past_key_values is not None:
        raise ValueError("cache, past_key_values: expected one of them, got both: they are the same argument")
    return past_key_values if cache is None else cache


def _cache_layers(cache: Any, count: int) -> list[SASCacheLayer | Pages | None]:
    if cache is None:
        return [None] * count
    layers = getattr(cache, "layers", ())
    if len(layers) != count or not all(isinstance(layer, (SASCacheLayer, Pages)) for layer in layers):
        raise ValueError(f"{CACHE}: expected DynamicCache(config=model.config), got {cache!r}")
    return list(layers)


def sinusoids(positions: Tensor, like: Tensor) -> Tensor:
    """sin and cos of position · 10000^(−2i/D), as wide as ``like`` [..., D] and of its dtype: [T or B, T, D]."""
    width = like.shape[-1]
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, device=like.device) / width)
    angle = positions[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :width].to(like.dtype)


class _WithHead(SASPreTrainedModel):
    """The body and a head over the vocabulary; ``causal`` is how such a model sees."""

    causal: bool
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # num_items_in_batch

    def __init__(self, config: SASConfig):
        if config.causal is not None and config.causal != self.causal:
            kind = type(self).__name__
            raise ValueError(f"causal: expected {self.causal} or None for {kind}, got {config.causal}")
        config = copy.deepcopy(config)
        config.causal = self.causal
        super().__init__(config)
        self.model = SASModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _loss(self, logits: Tensor, labels: Tensor | None, items: int | Tensor | None) -> Tensor | None:
        if labels is None:
            return None
        return self.loss_function(logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=items)


class SASForCausalLM(_WithHead, GenerationMixin):
    """A language model: the next token from those before it."""

    causal = True

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: Cache | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """With ``labels`` [B, T] (input_ids themselves; −100 is passed over) the output holds the mean loss.

        ``num_items_in_batch``, where transformers' Trainer gives it, is what the summed loss is divided by instead.
        ``past_key_values`` is the older name of ``cache``.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=_one_cache(cache, past_key_values), inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = self._loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            **{CACHE: out.get(CACHE)},
        )

    def _prepare_cache_for_generation(self, generation_config, *args, **kwargs):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f'cache_implementation: expected None or "dynamic", got {kind!r}')
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict:
        # generate(tokenizer=...), which stop strings need and servers always give, hands it to the model too;
        # by the name of kwargs generate knows that whatever forward takes may be given
        kwargs.pop("tokenizer", None)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def init_continuous_batching(self, *arguments: Any, **keywords: Any) -> Any:
        """As in every transformers model; ``generate_batch`` and ``transformers serve`` begin here."""
        return Batched(self).init_continuous_batching(*arguments, **keywords)


class SASForMaskedLM(_WithHead):
    """A masked language model: hidden tokens from those around them."""

    causal = False

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> MaskedLMOutput:  # fmt: skip
        """With ``labels`` [B, T] (−100 where nothing was hidden) the output holds the mean loss.

        ``num_items_in_batch``, where transformers' Trainer gives it, is what the summed loss is divided by instead.
        """
        out = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        logits = self.lm_head(out.last_hidden_state)
        loss = self._loss(logits, labels, num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


def register() -> None:
    """Lets AutoConfig, AutoModel, AutoModelForCausalLM and AutoModelForMaskedLM find these classes."""
    AutoConfig.register(SASConfig.model_type, SASConfig, exist_ok=True)
    AutoModel.register(SASConfig, SASModel, exist_ok=True)
    AutoModelForCausalLM.register(SASConfig, SASForCausalLM, exist_ok=True)
    AutoModelForMaskedLM.register(SASConfig, SASForMaskedLM, exist_ok=True)
