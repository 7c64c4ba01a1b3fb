"""Operators: schema, composition of torch operators, fake, autograd and public function, one file a stem."""

from gaugekit.ops import (
    nonlocal_energy,
    packed_linear,
    packed_linear_cuda,
    ragged_attention,
    shaped_attention,
    shaped_attention_fused,
    shaped_combine,
)

__all__ = [
    "nonlocal_energy",
    "packed_linear",
    "packed_linear_cuda",
    "ragged_attention",
    "shaped_attention",
    "shaped_attention_fused",
    "shaped_combine",
]
