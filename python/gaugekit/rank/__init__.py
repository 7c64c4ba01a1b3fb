"""The rank of the scores: spectra, truncation that knows the activations, bounds."""

from .preparation import prepare
from .search import embeddings, halves, needed, truncate
from .spectra import Spectrum, spectrum
from .truncation import Truncate, compact

__all__ = [
    "Spectrum",
    "Truncate",
    "compact",
    "embeddings",
    "halves",
    "needed",
    "prepare",
    "spectrum",
    "truncate",
]
