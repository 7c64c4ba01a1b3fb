"""Masks for property tests: what ``shaped_attention`` and ``shaped_combine`` may be told of who sees whom."""

import torch
from hypothesis import strategies as st


def draw_mask(draw, causal: bool, batch: int, queries: int, keys: int) -> dict:
    """Keyword arguments of a mask: with or without a window, and starts, lengths or packed sequences."""
    mask = {"causal": causal, "window": draw(st.none() | st.integers(1, 45))}
    if draw(st.booleans()):
        starts = st.lists(st.integers(-9, 50), min_size=batch, max_size=batch)
        mask["query_start"] = torch.tensor(draw(starts))
    if draw(st.booleans()):
        lengths = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
        mask["key_lengths"] = torch.tensor(draw(lengths))
    elif "query_start" not in mask and batch == 1 and queries == keys:
        cuts = sorted(draw(st.lists(st.integers(0, keys), max_size=4)))
        mask["cu_seqlens"] = torch.tensor([0, *cuts, keys], dtype=torch.int32)
    return mask
