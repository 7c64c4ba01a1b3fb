"""From a view to the compact forms of its parts: what is exactly 0 or 1 by construction is not stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gaugekit.models import AttentionView, Compact, Projection
from gaugekit.models.family import linear
from gaugekit.nn.triangle import pack_triangle
from gaugekit.ops.gauge_linear.layout import free_rows


def forms(view: AttentionView) -> dict[str, Compact]:
    """The parts ("q", "k", "v") that are stored otherwise than dense, read off the view.

    Queries and keys of which some channels are idle as "low_rank_projection"; keys and values whose gauge is fixed as
    "gauge_projection", or as "triangular_projection" where a triangle stands in the rows; keys that have lost their
    bias, the rest of their gauge barred, as "linear".
    """
    compact = low_rank(view)
    compact |= {name: gauge(part) for name, part in (("k", view.k), ("v", view.v)) if part.rows is not None}
    if "query_key" in view.barred and "key_bias" not in view.barred and view.k.bias is None:
        compact["k"] = linear(view.k)
    return compact


def gauge(part: Projection) -> Compact:
    """A fixed projection as the form "gauge_projection": ``free`` [heads, D − K, K], ``rows`` [heads, K]; or as
    "triangular_projection", with ``triangle`` [heads, K (K + 1) / 2] beside them.

    K is the number of rows; channels of the view beyond it are zero and become the form's padding.
    """
    heads, inputs, padded = part.weight.shape
    width = part.rows.shape[1]
    weight = part.weight[..., :width]

    def taken(rows: Tensor) -> Tensor:
        return weight.gather(1, rows[..., None].expand(-1, -1, width))

    tensors = {"free": taken(free_rows(part.rows, inputs)), "rows": part.rows.to(torch.int32)}
    if part.triangular:
        tensors["triangle"] = pack_triangle(taken(part.rows))
    if part.bias is not None:
        tensors["bias"] = part.bias.flatten()
    arguments = {"heads": heads, "inputs": inputs, "width": width, "bias": part.bias is not None}
    if padded != width:
        arguments["padded"] = padded
    return Compact("triangular_projection" if part.triangular else "gauge_projection", arguments, tensors)


def low_rank(view: AttentionView) -> dict[str, Compact]:
    """{"q", "k"} as the form "low_rank_projection", where some channels are idle; else nothing."""
    if view.channels is None or all(rank == view.k.weight.shape[2] for rank in view.ranks):
        return {}
    heads = [channels for channels in view.channels for _ in range(view.repeats)]
    return {"q": _low_rank(view.q, heads), "k": _low_rank(view.k, view.channels)}


def _low_rank(part: Projection, channels: Sequence[Sequence[int]]) -> Compact:
    _, inputs, width = part.weight.shape
    places = torch.cat([torch.tensor(kept) + width * head for head, kept in enumerate(channels)])
    tensors = {"weight": part.weight.movedim(1, 2).flatten(0, 1)[places], "places": places.to(torch.int32)}
    if part.bias is not None:
        tensors["bias"] = part.bias.flatten()[places]
    arguments = {
        "inputs": inputs,
        "width": width,
        "ranks": [len(kept) for kept in channels],
        "bias": part.bias is not None,
        "leading": all(list(kept) == list(range(len(kept))) for kept in channels),
    }
    return Compact("low_rank_projection", arguments, tensors)
