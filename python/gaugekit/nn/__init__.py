"""Modules: blocks without value and output matrices, compact forms of projections, and their registry."""

from . import forms
from .blocks import PreLNBlock, SASBlock, SASPBlock
from .cache import LayerCache
from .concat import Concat
from .gauge_projection import GaugeProjection
from .identity_linear import IdentityLinear
from .low_rank_projection import LowRankProjection
from .mlp import MLP
from .packed_embedding import PackedEmbedding
from .packed_linear import PackedLinear
from .parameter_groups import parameter_groups
from .shaped_attention import ShapedAttention

__all__ = [
    "MLP",
    "Concat",
    "GaugeProjection",
    "IdentityLinear",
    "LayerCache",
    "LowRankProjection",
    "PackedEmbedding",
    "PackedLinear",
    "PreLNBlock",
    "SASBlock",
    "SASPBlock",
    "ShapedAttention",
    "forms",
    "parameter_groups",
]
