"""SAS models in vLLM: their own class, since transformers' attention interface is not what they attend through.

vLLM's backend for transformers swaps the attention of modules that call ``ALL_ATTENTION_FUNCTIONS``. A SAS layer
computes α·V + β·softmax(Q Kᵀ/√K) V − γ·C V instead, V being x itself. The last two are what vLLM's paged attention
does: softmax with the real queries, and with queries of zeros the uniform C under the same mask. So each head asks
twice of the same keys and values, and the cache holds keys and x once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from gaugekit.hf.sas import SASModel
from gaugekit.hf.sas_pages import Pages, Step
from gaugekit.integrations.vllm.ranks import Ranks, cut_block
from gaugekit.nn import ShapedAttention
from gaugekit.nn.parallel import even

SIZES = (64, 96, 128, 192, 256)  # widths of a head that vLLM's backends take


class VllmPages(Pages):
    """One layer's vLLM attention, as ``ShapedAttention`` asks a paged cache to attend."""

    def __init__(self, attention: Attention):
        self.attention = attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, gains: dict[str, Tensor]) -> Tensor:
        """q [1, H, T, K], k [1, G, T, K], v [1, H, T, V] of all requests' new rows -> [1, H, T, V]."""
        heads, rows, width = v.shape[1:]
        k = k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], dim=1)
        size = self.attention.head_size
        q, k, wide = (pad(x[0], (0, size - x.shape[3])).transpose(0, 1) for x in (q, k, v))  # [T, H, size]
        if gains:
            q = torch.stack((q, torch.zeros_like(q)), dim=2)  # each head, and beside it one of zeros: C
        seen = self.attention(*(x.reshape(rows, -1) for x in (q, k, wide)))
        seen = seen.view(rows, heads, -1, size)[..., :width].transpose(0, 1)  # [H, T, 1 or 2, V]
        if not gains:
            return seen[None, :, :, 0]
        alpha, beta, gamma = (gains[name][:, None, None].to(v.dtype) for name in ("alpha", "beta", "gamma"))
        return (alpha * v[0] + beta * seen[:, :, 0] - gamma * seen[:, :, 1])[None]


class SASForCausalLM(nn.Module):
    """``gaugekit.integrations.sas.SASForCausalLM`` on vLLM's paged attention; not compiled.

    On several tensor-parallel ranks each has whole heads (``ranks.cut_block``). ValueError on several pipeline ranks,
    and where the ranks cannot share the groups of heads or the MLP evenly.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages != 1:
            raise ValueError(f"pipeline_parallel_size: expected 1 for a SAS model, got {stages}")
        self.config = config
        self.model = SASModel(config)
        self.model.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        group = get_tp_group()
        ranks = Ranks(group.world_size, group.rank_in_group)
        self.attention = nn.ModuleList()
        for layer, block in enumerate(self.model.layers):
            path = maybe_prefix(prefix, f"attention.{layer}")
            self.attention.append(self._attention(block.attention, ranks, vllm_config, path))
            if ranks.count > 1:
                cut_block(block.attention, block.mlp, ranks, f"model.layers.{layer}")

    def _attention(self, part: ShapedAttention, ranks: Ranks, vllm_config: Any, prefix: str) -> Attention:
        """vLLM's, for the heads of one rank."""
        width = max(part.key_width, part.head_width)
        size = next((size for size in SIZES if size >= width), None)
        if size is None:
            raise ValueError(f"key_width, head width: expected at most {SIZES[-1]} for vLLM, got {width}")
        heads = even("num_attention_heads", part.heads, ranks)
        return Attention(
            heads * (2 if part.shaped else 1),
            size,
            part.key_width**-0.5,
            num_kv_heads=heads,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=part.window,
            prefix=prefix,
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """input_ids [T] of all requests, end to end -> [T, D]."""
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        pages = Step([VllmPages(attention) for attention in self.attention])
        said = self.model(inputs_embeds=x[None], position_ids=positions[None], cache=pages, use_cache=False)
        return said.last_hidden_state[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's way, and every parameter has to come: ValueError for what is missing."""
        loaded = AutoWeightsLoader(self).load_weights(weights)
        if missing := sorted({name for name, _ in self.named_parameters()} - loaded):
            raise ValueError(f"{len(missing)} weights are missing: {', '.join(missing[:4])}")
        return loaded
