"""y_h = x[·, P_h] + x[·, P̄_h] F_h, head by head."""

from __future__ import annotations

import torch
from torch import Tensor


def gauge_linear(
    x: Tensor, free: Tensor, rows: Tensor, bias: Tensor | None = None, weight: Tensor | None = None,
    weight_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As ``gaugekit.gauge_linear``: x [..., D], ``free`` [heads, D − width, width], ``rows`` [heads, width]."""
    parts = [] if weight is None else [x @ weight.mT]
    if weight_bias is not None:
        parts[0] = parts[0] + weight_bias
    width = rows.shape[1]
    for head, passed in enumerate(rows.tolist()):
        others = [i for i in range(x.shape[-1]) if i not in passed]
        y = x[..., passed] + x[..., others] @ free[head]
        parts.append(y if bias is None else y + bias[head * width : (head + 1) * width])
    return torch.cat(parts, -1) if parts else x[..., :0]
