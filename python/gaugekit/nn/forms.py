"""The registry of forms: the compact modules a checkpoint's ``config.json`` or ``fuse`` may name.

A spec is ``{"form": name, "arguments": {...}}``, JSON values only. A new form is one entry here; loaders ask ``build``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gaugekit.nn.concat import Concat
from gaugekit.nn.gauge_projection import GaugeProjection
from gaugekit.nn.low_rank_projection import LowRankProjection
from gaugekit.nn.packed_embedding import PackedEmbedding
from gaugekit.nn.packed_linear import PackedLinear
from gaugekit.nn.triangular_projection import TriangularProjection


def _linear(
    inputs: int,
    outputs: int,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    return nn.Linear(inputs, outputs, bias, device=device, dtype=dtype)


def _concat(
    parts: list[dict],
    groups: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    return Concat((build(part, device=device, dtype=dtype) for part in parts), groups)


FORMS: dict[str, Callable[..., nn.Module]] = {
    "concat": _concat,
    "gauge_projection": GaugeProjection,
    "linear": _linear,
    "low_rank_projection": LowRankProjection,
    "packed_embedding": PackedEmbedding,
    "packed_linear": PackedLinear,
    "triangular_projection": TriangularProjection,
}


def build(
    spec: dict, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The module of a spec, its weights still to be loaded.

    Raises ValueError for a spec of another shape, a form that is not known (naming those that are) or arguments the
    form does not take: a checkpoint written by a newer gaugekit, or damaged.
    """
    if (
        not isinstance(spec, dict)
        or set(spec) != {"form", "arguments"}
        or not isinstance(spec["arguments"], dict)
    ):
        raise ValueError(f'form: expected {{"form": name, "arguments": {{...}}}}, got {spec!r}')
    name = spec["form"]
    if name not in FORMS:
        raise ValueError(
            f"form: expected one of {', '.join(sorted(FORMS))}; got {name!r} (written by a newer gaugekit?)"
        )
    try:
        return FORMS[name](**spec["arguments"], device=device, dtype=dtype)
    except TypeError as error:
        raise ValueError(f"form {name!r}: its arguments do not fit: {error}") from error
