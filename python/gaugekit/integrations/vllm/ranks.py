"""Models of ours on several of vLLM's tensor-parallel ranks: each has whole heads, and of an identity a slice of x.

vLLM's loaders read whole tensors on every rank. So a rank's module is simply a smaller one, and each of its tensors
takes its part of the whole one by a ``weight_loader``, as vLLM's own layers do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.transformers.utils import replace_linear_class

from gaugekit.nn import MLP, IdentityLinear, ShapedAttention
from gaugekit.nn.gauge_projection import GaugeProjection
from gaugekit.nn.low_rank_projection import LowRankProjection
from gaugekit.nn.parallel import LocalColumns, even


@dataclass(frozen=True)
class Ranks:
    """Which of ``count`` ranks this one is; ``nn.parallel`` asks it as it asks a mesh."""

    count: int
    number: int

    def size(self) -> int:
        return self.count

    def get_local_rank(self) -> int:
        return self.number


def cut_forms(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Puts this rank's part in the place of every form in ``model``, a transformers model; vLLM cuts the plain layers
    by the same plan afterwards.

    ValueError for a family without a plan, a form that the plan does not cut by outputs or whose parts are of several
    kinds, and heads that do not come out even.
    """
    plan = model.tp_plan or {}
    if not plan:
        raise ValueError(
            "tensor_parallel_size: expected 1 for a model that gaugekit converted and transformers has no tensor "
            f"parallel plan for, a {type(model).__name__}, got {ranks.count}"
        )
    forms = [(path, module) for path, module in model.named_modules() if getattr(module, "form", None)]
    for path, form in forms:
        style = next((style for pattern, style in plan.items() if re.match(pattern, path)), None)
        if style != "colwise" or not isinstance(form, (GaugeProjection, LowRankProjection)):
            raise ValueError(
                f"tensor_parallel_size: expected 1 for a model with a {type(form).__name__} at {path}, which cannot be "
                f"cut by heads, got {ranks.count}; a directory converted with --dense can be cut"
            )
        model.set_submodule(path, _heads_of(form, path, ranks, device))


def cut_block(attention: ShapedAttention, mlp: MLP, ranks: Ranks, prefix: str) -> None:
    """Makes the two parts of a block of ours compute this rank's heads and its share of the MLP's inner width."""
    even(f"{prefix}: groups", attention.key_groups, ranks)
    even(f"{prefix}: intermediate_size", mlp.up.out_features, ranks)
    heads = {
        "query": attention.heads * attention.key_width,
        "key": attention.key_groups * attention.key_width,
        "value": attention.heads * attention.head_width,
    }
    for name, width in heads.items():
        part = getattr(attention, name)
        if part is None or isinstance(part, nn.Identity):
            setattr(attention, name, LocalColumns(width, ranks))
        elif isinstance(part, IdentityLinear):
            setattr(attention, name, IdentityColumns(part, ranks))
        else:
            cut = replace_linear_class(part, "colwise", prefix=f"{prefix}.attention.{name}")
            setattr(attention, name, cut)
    for name in ("alpha", "beta", "gamma") if attention.shaped else ():
        setattr(attention, name, _part(getattr(attention, name), attention.heads // ranks.count, ranks))
    attention.output = (
        AllHeads()
        if attention.output is None
        else replace_linear_class(attention.output, "rowwise", prefix=f"{prefix}.attention.output")
    )
    for name, style in {"gate": "colwise", "up": "colwise", "down": "rowwise"}.items():
        if (matrix := getattr(mlp, name)) is not None:
            setattr(mlp, name, replace_linear_class(matrix, style, prefix=f"{prefix}.mlp.{name}"))


class AllHeads(nn.Module):
    """The heads of all ranks side by side, on each of them: what no output matrix adds up."""

    def forward(self, y: Tensor) -> Tensor:
        return tensor_model_parallel_all_gather(y, -1)


class IdentityColumns(nn.Module):
    """This rank's columns of an ``IdentityLinear``: α·x[columns] + β·(x Wᵀ)[columns]."""

    def __init__(self, whole: IdentityLinear, ranks: Ranks):
        super().__init__()
        width = whole.weight.shape[0]
        self.columns = LocalColumns(width, ranks)
        self.weight = _part(whole.weight, width // ranks.count, ranks)
        self.alpha, self.beta = whole.alpha, whole.beta

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * self.columns(x) + self.beta * nn.functional.linear(x, self.weight)


def _heads_of(
    form: GaugeProjection | LowRankProjection, path: str, ranks: Ranks, device: torch.device
) -> nn.Module:
    """The form of this rank's heads alone, on ``device``, each of its tensors with a loader."""
    make = {"device": device, "dtype": next(form.parameters()).dtype}
    if isinstance(form, GaugeProjection):
        heads = even(f"{path}: heads", form.heads, ranks)
        part = type(form)(**form.arguments | {"heads": heads}, **make)
        begins, moved = {name: ranks.number * x.shape[0] for name, x in part.state_dict().items()}, {}
    else:
        heads = even(f"{path}: heads", len(form.ranks), ranks)
        first = heads * ranks.number
        part = LowRankProjection(**form.arguments | {"ranks": form.ranks[first : first + heads]}, **make)
        begins = dict.fromkeys(part.state_dict(), sum(form.ranks[:first]))
        moved = {"places": first * form.width}  # the whole one's count from the first head of all
    for name, whole in form.state_dict().items():
        _takes(getattr(part, name), whole.shape, begins[name], moved.get(name, 0))
    return part


def _part(whole: Tensor, length: int, ranks: Ranks) -> nn.Parameter:
    """A parameter for this rank's ``length`` rows of ``whole``."""
    part = nn.Parameter(torch.empty_like(whole[:length]))
    _takes(part, whole.shape, length * ranks.number)
    return part


def _takes(part: Tensor, shape: torch.Size, begin: int, moved: int = 0) -> None:
    """Lets ``part`` load its rows, from ``begin`` on, of a whole tensor of that ``shape``, less ``moved``."""

    def load(part: Tensor, whole: Tensor) -> None:
        if whole.shape != shape:
            raise ValueError(f"expected a weight of {tuple(shape)}, got {tuple(whole.shape)}")
        part.data.copy_(whole[begin : begin + part.shape[0]] - moved)

    part.weight_loader = load
