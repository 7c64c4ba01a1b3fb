"""Operators: schema, composition of torch operators, fake, autograd and public function, one folder a stem.

Importing this registers them all, and loads the binaries that have faster implementations.
"""

import gaugekit._library as _library
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

import gaugekit.ops.sharding as _sharding

_library.load()
_sharding.register_beside()
