"""gaugekit removes from a transformer what nobody can observe."""

import os as _os
import sys as _sys
from importlib import import_module as _import_module
from typing import TYPE_CHECKING


def _torch_is_spared() -> bool:
    """Whether this process is ``gaugekit pack`` or ``unpack``, or ``python -m gaugekit`` with one of them: importing
    torch would take as long as what they do, and they do without. What needs it still imports it.
    """
    program, *arguments = getattr(_sys, "argv", None) or [""]
    if program == "-m":  # as long as Python looks for the module
        program = "".join(_sys.orig_argv[-1 - len(arguments) :][:1]).removeprefix("-m")
    return _os.path.basename(program) == "gaugekit" and arguments[:1] in (["pack"], ["unpack"])


if TYPE_CHECKING or not _torch_is_spared():
    from gaugekit import ops  # registers the operators
    from gaugekit.ops.nonlocal_energy.operator import nonlocal_energy
    from gaugekit.ops.shaped_attention.operator import shaped_attention

if TYPE_CHECKING:
    from gaugekit import calibration as statistics
    from gaugekit import codec, distributed, models, nn, rank, rewrite, slicing, symmetry
    from gaugekit import text as samples
    from gaugekit.ops.gauge_linear import gauge_linear
    from gaugekit.ops.packed_linear import pack_weight, packed_linear, unpack_weight
    from gaugekit.ops.ragged_attention import ragged_attention
    from gaugekit.ops.single_cache_attention import single_cache_attention
    from gaugekit.report import Report
    from gaugekit.text.perplexity import perplexity
    from gaugekit.verbs.convert import convert
    from gaugekit.verbs.fuse import fuse, unfuse
    from gaugekit.verbs.heal import heal
    from gaugekit.verbs.inspect import inspect
    from gaugekit.verbs.verify import check_certificate, verify

__version__ = "0.1.0"

__all__ = [
    "Report",
    "check_certificate",
    "codec",
    "convert",
    "distributed",
    "fuse",
    "gauge_linear",
    "heal",
    "inspect",
    "models",
    "nn",
    "nonlocal_energy",
    "ops",
    "pack_weight",
    "packed_linear",
    "perplexity",
    "ragged_attention",
    "rank",
    "rewrite",
    "samples",
    "shaped_attention",
    "single_cache_attention",
    "slicing",
    "statistics",
    "symmetry",
    "unfuse",
    "unpack_weight",
    "verify",
]

# Public names that are found when first asked for, so that importing gaugekit stays light: name -> module[:attribute].
# Type checkers and editors, which do not run this, read the imports above instead.
_LAZY = {
    "Report": "gaugekit.report:Report",
    "check_certificate": "gaugekit.verbs.verify:check_certificate",
    "codec": "gaugekit.codec",
    "convert": "gaugekit.verbs.convert:convert",
    "distributed": "gaugekit.distributed",
    "fuse": "gaugekit.verbs.fuse:fuse",
    "gauge_linear": "gaugekit.ops.gauge_linear:gauge_linear",
    "heal": "gaugekit.verbs.heal:heal",
    "inspect": "gaugekit.verbs.inspect:inspect",
    "models": "gaugekit.models",
    "nn": "gaugekit.nn",
    "nonlocal_energy": "gaugekit.ops.nonlocal_energy:nonlocal_energy",
    "ops": "gaugekit.ops",
    "pack_weight": "gaugekit.ops.packed_linear:pack_weight",
    "packed_linear": "gaugekit.ops.packed_linear:packed_linear",
    "perplexity": "gaugekit.text.perplexity:perplexity",
    "ragged_attention": "gaugekit.ops.ragged_attention:ragged_attention",
    "rank": "gaugekit.rank",
    "rewrite": "gaugekit.rewrite",
    "samples": "gaugekit.text",
    "shaped_attention": "gaugekit.ops.shaped_attention:shaped_attention",
    "single_cache_attention": "gaugekit.ops.single_cache_attention:single_cache_attention",
    "slicing": "gaugekit.slicing",
    "statistics": "gaugekit.calibration",
    "symmetry": "gaugekit.symmetry",
    "unfuse": "gaugekit.verbs.fuse:unfuse",
    "unpack_weight": "gaugekit.ops.packed_linear:unpack_weight",
    "verify": "gaugekit.verbs.verify:verify",
}


if not TYPE_CHECKING:  # or a type checker would believe in every name

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module 'gaugekit' has no attribute {name!r}")
        module, _, attribute = _LAZY[name].partition(":")
        value = _import_module(module)
        return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
