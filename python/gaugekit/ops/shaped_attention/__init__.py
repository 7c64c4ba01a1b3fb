"""O = β·softmax(scale·Q Kᵀ) V + α·V − γ·C V + λ·(V⁰ − V): a softmax core and ``shaped_combine``, or one operator."""

from gaugekit.ops.shaped_attention import fused  # noqa: F401 - it registers its operator
from gaugekit.ops.shaped_attention.choice import use_core
from gaugekit.ops.shaped_attention.operator import Plan, plan, shaped_attention

__all__ = ["Plan", "plan", "shaped_attention", "use_core"]
