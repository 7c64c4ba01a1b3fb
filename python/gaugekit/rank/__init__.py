"""The rank of the scores: spectra, truncation that knows the activations, bounds."""

from gaugekit.rank.bounds import bound, covering_bound, nuclear_penalty
from gaugekit.rank.goal import Goal, needed
from gaugekit.rank.preparation import prepare
from gaugekit.rank.search import embeddings, halves, truncate
from gaugekit.rank.spectra import Spectrum, head_ranks, head_values, rounding_norm, spectrum
from gaugekit.rank.truncation import Truncate

__all__ = [
    "Goal",
    "Spectrum",
    "Truncate",
    "bound",
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
