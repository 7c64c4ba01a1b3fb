"""Attention with a rank of its own for each head, heads stored side by side."""

from gaugekit.ops.ragged_attention.operator import ragged_attention

__all__ = ["ragged_attention"]
