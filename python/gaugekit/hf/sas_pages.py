"""SAS models in transformers' continuous batching: their keys and inputs in the pages of its cache.

The cache has one shape for keys and for values, and a SAS model has not: keys [G, K] of each group, values [H, V], the
normalised input. Here both are one vector a token, as wide as the wider of the two, so that nothing is repeated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gaugekit.hf.attention import interface, paged
from gaugekit.hf.upstream import unfit

try:
    from transformers import PreTrainedConfig
    from transformers.generation.continuous_batching import ContinuousMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise unfit(__name__, error) from error


class Pages:
    """What one layer has of the paged cache in one step; ``ShapedAttention`` asks it to attend."""

    columns = 0  # positions are given, and no row is padding

    def __init__(self, layer: int, width: int, said: dict[str, Any]):
        self.layer, self.width = layer, width
        self.said = dict(said)  # the cache exchanges entries for those of the layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, gains: dict[str, Tensor]) -> Tensor:
        """q [1, H, T, K], k [1, G, T, K], v [1, H, T, V] of all requests' new rows -> [1, H, T, V]."""
        stored = (
            pad(x.transpose(1, 2).flatten(2), (0, self.width - x.shape[1] * x.shape[3])) for x in (k, v)
        )
        stored = (x[:, None] for x in stored)
        all_k, all_v = self.said["cache"].update(*stored, self.layer, self.said)
        k, v = (_heads(seen, x) for seen, x in ((all_k, k), (all_v, v)))
        k = k if k.shape[1] == v.shape[1] else k.repeat_interleave(v.shape[1] // k.shape[1], dim=1)
        bounds = (self.said[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
        return paged.paged_attention(q, k, v, *bounds, window=window, **gains)


class Step(NamedTuple):
    """The paged cache as ``SASModel`` takes a cache: a layer each."""

    layers: list[Pages]


def _heads(stored: Tensor, like: Tensor) -> Tensor:
    """The vectors [1, 1, S, width] as heads of ``like`` [1, heads, T, width of one]: [1, heads, S, width of one]."""
    numbers = like.shape[1] * like.shape[3]
    return stored[:, 0, :, :numbers].unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2)


class Batched(ContinuousMixin, nn.Module):
    """A ``SASForCausalLM`` as continuous batching runs it: the same weights, another cache."""

    _supports_flash_attn = False

    def __init__(self, model: nn.Module):
        super().__init__()
        interface.register()
        if any(getattr(module, "single_cache", False) for module in model.modules()):
            raise ValueError(
                "continuous batching: expected a model that caches keys and values, which is what its pages hold, got "
                "one fused to cache its input; gaugekit.unfuse(model) first"
            )
        self.model, sizes = model, model.config
        attention = sizes.block_of(0, device="meta").attention
        key_numbers = attention.key_width * (sizes.num_key_value_heads or sizes.num_attention_heads)
        self.width = max(sizes.hidden_size, key_numbers)
        self.generation_config = model.generation_config
        self.config = PreTrainedConfig(
            eos_token_id=sizes.eos_token_id, pad_token_id=sizes.pad_token_id, bos_token_id=sizes.bos_token_id,
        )  # fmt: skip
        # The names that the cache reads. A window is left to the attention: all rows stay in the cache.
        self.config.vocab_size, self.config.hidden_size = sizes.vocab_size, sizes.hidden_size
        self.config.num_hidden_layers, self.config.head_dim = sizes.num_hidden_layers, self.width
        self.config.num_attention_heads = self.config.num_key_value_heads = 1
        self.config._attn_implementation = interface.NAME

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def _get_logits_processor(self, *arguments: Any, **keywords: Any) -> Any:
        return self.model._get_logits_processor(*arguments, **keywords)

    def _supports_logits_to_keep(self) -> bool:
        return True

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **said: Any
    ) -> CausalLMOutputWithPast:
        """One step of all requests: input_ids [1, T] -> logits [1, those of ``logits_to_keep``, vocabulary]."""
        cache = Step([Pages(layer, self.width, said) for layer in range(self.config.num_hidden_layers)])
        body = self.model.model
        x = body(input_ids, position_ids=position_ids, cache=cache, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.model.lm_head(x[:, logits_to_keep]))
