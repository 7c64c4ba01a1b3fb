"""gaugekit removes from a transformer what nobody can observe."""

import importlib

from gaugekit import _library, ops
from gaugekit.ops.nonlocal_energy.operator import nonlocal_energy
from gaugekit.ops.shaped_attention.operator import shaped_attention

__version__ = "0.1.0"

__all__ = ["nonlocal_energy", "ops", "shaped_attention"]

_library.load()

# Public names that are found when first asked for, so that importing gaugekit stays light: name -> module[:attribute].
_LAZY = {
    "codec": "gaugekit.codec",
    "convert": "gaugekit.verbs.convert:convert",
    "fuse": "gaugekit.verbs.fuse:fuse",
    "heal": "gaugekit.verbs.heal:heal",
    "inspect": "gaugekit.verbs.inspect:inspect",
    "models": "gaugekit.models",
    "nn": "gaugekit.nn",
    "pack_weight": "gaugekit.ops.packed_linear:pack_weight",
    "packed_linear": "gaugekit.ops.packed_linear:packed_linear",
    "ragged_attention": "gaugekit.ops.ragged_attention:ragged_attention",
    "rank": "gaugekit.rank",
    "rewrite": "gaugekit.rewrite",
    "samples": "gaugekit.text",
    "statistics": "gaugekit.calibration",
    "symmetry": "gaugekit.symmetry",
    "unfuse": "gaugekit.verbs.fuse:unfuse",
    "unpack_weight": "gaugekit.ops.packed_linear:unpack_weight",
    "verify": "gaugekit.verbs.verify:verify",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'gaugekit' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
