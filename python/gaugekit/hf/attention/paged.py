"""Attention over transformers' paged cache, whose requests stand one after the other in one row: continuous batching.

transformers hands the keys of all requests laid end to end, [1, G, S₁ + S₂ + …, K], and says where each begins; the
queries likewise. Each request then is one call of ``gaugekit.shaped_attention`` on views, and those that decode (one
query each) are a call together. No array of queries × keys is made, where sdpa and eager make one over all requests.

transformers has no registry for the attentions that can do this; its manager refuses every name it does not know.
``register`` lets ours pass.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.hf.attention.neutreno import SharedValues
from gaugekit.hf.upstream import unfit
from gaugekit.ops.operands import Gain
from gaugekit.ops.shaped_attention.operator import shaped_attention

try:
    from transformers.generation.continuous_batching import PagedAttentionCache
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
except ImportError as error:
    raise unfit(__name__, error) from error

# What transformers tells an attention about the pages.
ARGUMENTS = {
    "block_table", "cache", "cu_seq_lens_k", "cu_seq_lens_q", "logits_indices", "logits_processor_args",
    "logits_to_keep", "max_length_k", "max_length_q", "read_index", "write_index",
}  # fmt: skip
_own_switch = ContinuousBatchingManager.switch_to_cb_friendly_attn


def register(name: str) -> None:
    """Lets continuous batching keep the attention called ``name``; doing it again changes nothing."""
    if getattr(ContinuousBatchingManager.switch_to_cb_friendly_attn, "attention", None) == name:
        return

    @functools.wraps(_own_switch)
    def switch(self: ContinuousBatchingManager, model: nn.Module, *arguments: Any, **keywords: Any) -> None:
        if model.config._attn_implementation != name:
            _own_switch(self, model, *arguments, **keywords)

    switch.attention = name
    ContinuousBatchingManager.switch_to_cb_friendly_attn = switch


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: dict[str, Any],
    scaling: float | None,
    window: int | None,
    shared: SharedValues | None,
) -> Tensor:
    """The attention of ``module`` over the paged cache: query [1, H, T, K] -> [1, T, H, V].

    ``pages`` are transformers' keyword arguments, of which the cache exchanges some in place. ``shared`` adds
    NeuTRENO's term. Raises ValueError inside a CUDA graph, where the bounds cannot be read on the host.
    """
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "use_cuda_graph: expected False for continuous batching with attn_implementation='gaugekit', whose calls "
            "differ from step to step (gaugekit serve DIR -- --no-cb-use-cuda-graph)"
        )
    if isinstance(
        pages.get("cache"), PagedAttentionCache
    ):  # until 5.23 the attention stores keys and values itself
        key, value = pages["cache"].update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=pages
        )
    if pages.get("block_table") is not None:
        raise ValueError(
            "block_table: shaped attention reads the cache by index; expected max_blocks_per_request=0"
        )
    queries, keys = (pages[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    terms = {}
    if shared is not None:
        own = [torch.arange(end - count, end) for count, end in zip(_sizes(queries), keys[1:], strict=True)]
        rows = torch.cat(own).to(value.device)
        # rows that only fill the batch up stand behind the last request
        kept = torch.cat([rows, rows.new_zeros(query.shape[2] - len(rows))])
        terms = shared.of(module, value, value[:, :, kept], query.shape[1])
    out = paged_attention(query, key, value, queries, keys, scale=scaling, window=window, **terms)
    return out.transpose(1, 2).contiguous()


@torch.compiler.disable
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequence[int],
    keys: Sequence[int],
    *,
    window: int | None = None,
    v0: Tensor | None = None,
    scale: float | None = None,
    **gains: Gain | None,
) -> Tensor:
    """``gaugekit.shaped_attention``, causal, of each request: [1, H, T, V]; rows of no request are zero.

    q [1, H, T, K]; k [1, G, S, K]; v [1, G, S, V]; v0 [1, G, T, V]. Request i has the queries from queries[i] to
    queries[i + 1], the last of its keys from keys[i] to keys[i + 1]. ``window``, ``scale`` and the gains are those of
    ``shaped_attention``.
    """
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    steps = defaultdict(list)
    spans = zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True)
    for (begin, end), (first, last) in spans:
        if end - begin == 1:
            # together with others of up to twice their length: what is read in vain is never more than the cache
            steps[(last - first).bit_length()].append((begin, first, last - first))
        elif end > begin:
            more = {} if v0 is None else {"v0": v0[:, :, begin:end]}
            part = (q[:, :, begin:end], k[:, :, first:last], v[:, :, first:last])
            out[:, :, begin:end] = shaped_attention(
                *part, causal=True, window=window, scale=scale, **more, **gains
            )
    for group in steps.values():
        row, first, length = torch.tensor(group, device=q.device).unbind(1)
        longest = max(length for _, _, length in group)
        places = first[:, None] + torch.arange(longest, device=q.device).minimum(length[:, None] - 1)
        more = {} if v0 is None else {"v0": v0[0][:, row, None].transpose(0, 1)}
        part = (q[0][:, row, None].transpose(0, 1), _gathered(k, places), _gathered(v, places))
        # what is causal costs a mask; a lone query that sees all its keys needs none
        if more or gains or (window is not None and longest > window):
            more |= {"causal": True, "query_start": length - 1, "window": window}
        step = shaped_attention(*part, key_lengths=length, scale=scale, **more, **gains)
        out[0, :, row] = step[:, :, 0].transpose(0, 1)
    return out


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    """Rows ``places`` [N, S'] of x [1, G, S, width]: [N, G, S', width], a row of all heads copied at once."""
    rows = x[0].transpose(0, 1).index_select(0, places.flatten())
    return rows.unflatten(0, places.shape).transpose(1, 2)


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in itertools.pairwise(bounds)]
