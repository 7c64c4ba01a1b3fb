"""O = β·A + α·V − γ·C V + λ·(V⁰ − V), the softmax output A given."""

from gaugekit.ops.shaped_combine import cuda  # noqa: F401 - it registers its operator
from gaugekit.ops.shaped_combine.operator import shaped_combine

__all__ = ["shaped_combine"]
