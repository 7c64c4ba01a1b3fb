"""The rank of the scores: spectra, truncation that knows the activations, bounds."""

from .bounds import bound, covering_bound, nuclear_penalty
from .preparation import prepare
from .search import embeddings, halves, needed, truncate
from .spectra import Spectrum, head_ranks, head_values, rounding_norm, spectrum
from .truncation import Truncate, compact

__all__ = [
    "Spectrum",
    "Truncate",
    "bound",
    "compact",
    "covering_bound",
    "embeddings",
    "halves",
    "head_ranks",
    "head_values",
    "needed",
    "nuclear_penalty",
    "prepare",
    "rounding_norm",
    "spectrum",
    "truncate",
]
