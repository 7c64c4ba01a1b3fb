"""Modules: blocks without value and output matrices, NeuTRENO, compact forms of projections and their registry."""

from . import forms
from .blocks import PreLNBlock, SASBlock, SASPBlock
from .cache import LayerCache
from .concat import Concat
from .gauge_projection import GaugeProjection
from .identity_linear import IdentityLinear
from .lam_schedule import LamSchedule
from .low_rank_attention import LowRankAttention
from .low_rank_projection import LowRankProjection
from .mlp import MLP
from .neutreno import NeutrenoBlock, ValueSharing
from .neutreno_attention import NeutrenoAttention
from .nonlocal_regularizer import NonlocalRegularizer
from .packed_embedding import PackedEmbedding
from .packed_linear import PackedLinear
from .parameter_groups import parameter_groups
from .shaped_attention import ShapedAttention
from .tap import Tap

__all__ = [
    "MLP",
    "Concat",
    "GaugeProjection",
    "IdentityLinear",
    "LamSchedule",
    "LayerCache",
    "LowRankAttention",
    "LowRankProjection",
    "NeutrenoAttention",
    "NeutrenoBlock",
    "NonlocalRegularizer",
    "PackedEmbedding",
    "PackedLinear",
    "PreLNBlock",
    "SASBlock",
    "SASPBlock",
    "ShapedAttention",
    "Tap",
    "ValueSharing",
    "forms",
    "parameter_groups",
]
