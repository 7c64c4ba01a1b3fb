"""Modules: blocks without value and output matrices, NeuTRENO, compact forms of projections and their registry."""

from gaugekit.nn import forms
from gaugekit.nn.blocks import PreLNBlock, SASBlock, SASPBlock, SkiplessBlock
from gaugekit.nn.cache import LayerCache
from gaugekit.nn.concat import Concat
from gaugekit.nn.gauge_projection import GaugeProjection
from gaugekit.nn.identity_linear import IdentityLinear
from gaugekit.nn.lam_schedule import LamSchedule
from gaugekit.nn.low_rank_attention import LowRankAttention
from gaugekit.nn.low_rank_projection import LowRankProjection
from gaugekit.nn.mlp import MLP
from gaugekit.nn.neutreno import NeutrenoBlock, ValueSharing
from gaugekit.nn.neutreno_attention import NeutrenoAttention
from gaugekit.nn.nonlocal_regularizer import NonlocalRegularizer
from gaugekit.nn.packed_embedding import PackedEmbedding
from gaugekit.nn.packed_experts import PackedExperts
from gaugekit.nn.packed_linear import PackedLinear
from gaugekit.nn.parameter_groups import parameter_groups
from gaugekit.nn.shaped_attention import ShapedAttention
from gaugekit.nn.tap import Tap
from gaugekit.nn.triangular_projection import TriangularProjection

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
    "PackedExperts",
    "PackedLinear",
    "PreLNBlock",
    "SASBlock",
    "SASPBlock",
    "ShapedAttention",
    "SkiplessBlock",
    "Tap",
    "TriangularProjection",
    "ValueSharing",
    "forms",
    "parameter_groups",
]
