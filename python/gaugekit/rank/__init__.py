"""The rank of the scores: spectra, truncation that knows the activations, bounds."""

from .bounds import bound, covering_bound, nuclear_penalty
from .preparation import prepare
from .search import embeddings, halves, needed, truncate
from .spectra import Spectrum, spectrum
from .truncation import Truncate, compact

__all__ = [
    "Spectrum",
    "Truncate",
    "bound",
    "compact",
    "covering_bound",
    "embeddings",
    "halves",
    "needed",
    "nuclear_penalty",
    "prepare",
    "spectrum",
    "truncate",
]
