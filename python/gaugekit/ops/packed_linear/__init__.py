"""y = x Wᵀ + b with W kept in a fixed-length lossless layout and decoded inside the product."""

from gaugekit.ops.packed_linear import cuda  # noqa: F401 - it registers its operator
from gaugekit.ops.packed_linear.experts import packed_experts
from gaugekit.ops.packed_linear.operator import packed_linear
from gaugekit.ops.packed_linear.weight import PackedWeight, pack_weight, unpack_weight

__all__ = ["PackedWeight", "pack_weight", "packed_experts", "packed_linear", "unpack_weight"]
