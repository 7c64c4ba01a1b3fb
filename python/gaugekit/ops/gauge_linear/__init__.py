"""y_h = x[·, P_h] + x[·, P̄_h] F_h: a projection that skips its identity blocks."""

from gaugekit.ops.gauge_linear import cuda  # noqa: F401 - it registers its operators
from gaugekit.ops.gauge_linear.operator import gauge_linear

__all__ = ["gauge_linear"]
