"""Operators: schema, composition of torch operators, fake, autograd and public function, one folder a stem."""

from gaugekit.ops import (
    bitsback,
    canonical_qr,
    gauge_linear,
    nonlocal_energy,
    packed_linear,
    ragged_attention,
    rans,
    shaped_attention,
    shaped_combine,
    single_cache_attention,
)

__all__ = [
    "bitsback",
    "canonical_qr",
    "gauge_linear",
    "nonlocal_energy",
    "packed_linear",
    "ragged_attention",
    "rans",
    "shaped_attention",
    "shaped_combine",
    "single_cache_attention",
]
