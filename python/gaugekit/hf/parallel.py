"""How transformers' tensor parallelism cuts what is ours: styles for its plans, and the plans of SAS models.

``from_pretrained(..., distributed_config=DistributedConfig(tp_plan="auto"))`` reads ``base_model_tp_plan``. A converted
model keeps its family's plan; where that says "colwise" and a form of ours stands there, the form's style takes its
place, or one that refuses with the reason.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gaugekit.nn.parallel import SHARES

try:
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
    from transformers.distributed.tensor_parallel import ColwiseParallel, TensorParallelLayer
except ImportError:  # before transformers 5.23, where models of ours load but are not cut
    ALL_PARALLEL_STYLES, TensorParallelLayer = None, object

OURS = "gaugekit"
FUSED, PACKED, SLICED = "gaugekit_fused", "gaugekit_packed", "gaugekit_sliced"


class Shared(TensorParallelLayer):
    """Cuts a module of ours as ``nn.parallel`` does; an identity not at all, and a matrix by outputs, as "colwise"."""

    def __init__(self):
        self.plain = ColwiseParallel()

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        share = SHARES.get(type(module))
        if share is None:
            return self.plain.shard_param(module, param, mesh)
        if (dim := share.cuts.get(param)) is not None and module._parameters[param] is not None:
            from torch.distributed.tensor import Shard, distribute_tensor

            whole = module._parameters[param]
            cut = distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(cut, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        if isinstance(module, nn.Identity):
            return module
        share = SHARES.get(type(module))
        if share is None:
            return self.plain.install_forward(module, mesh)
        share.install(module, mesh)
        return module


class Refused(TensorParallelLayer):
    """Stands in a plan for a module that no rank can have a part of, and says why."""

    def __init__(self, why: str):
        self.why = why

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        self.install_forward(module, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        raise ValueError(
            f"tp_plan: {self.why}, got a {type(module).__name__}; load the model without tp_plan"
        )


def adapt(model: nn.Module, plan: dict[str, str], refused: str | None) -> None:
    """Puts our styles in ``plan`` for the modules of ``model`` that are forms of ours; or, where no part of the model
    can be cut, ``refused``, the style that says why.
    """
    for name, module in model.named_modules():
        key = replace_layer_number_by_wildcard(name)
        if key not in plan or plan[key] == FUSED:
            continue
        if refused is not None:
            plan[key] = refused
        elif getattr(module, "form", None) is not None:
            plan[key] = OURS if type(module) in SHARES and plan[key] in ("colwise", OURS) else FUSED


def plan_of_blocks(*, value: bool, output: bool, gated: bool) -> dict[str, str]:
    """The plan of models made of our blocks: whether some layer has a value matrix, an output matrix, a gated MLP."""
    plan = {"attention": OURS, "attention.query": OURS, "attention.key": OURS}
    plan |= {"mlp.up": "colwise", "mlp.down": "rowwise"}
    plan |= {"attention.value": OURS} if value else {}
    plan |= {"attention.output": "rowwise"} if output else {}
    plan |= {"mlp.gate": "colwise"} if gated else {}
    return {f"layers.*.{name}": style for name, style in plan.items()}


def register() -> None:
    """Enters our styles in transformers' registry, where it has one that takes them; doing it again changes nothing."""
    if ALL_PARALLEL_STYLES is None:
        return
    ALL_PARALLEL_STYLES.register(OURS, Shared())
    ALL_PARALLEL_STYLES.register(FUSED, Refused("expected projections that can be cut by heads"))
    ALL_PARALLEL_STYLES.register(PACKED, Refused("expected plain weights, since packed ones cannot be cut"))
    ALL_PARALLEL_STYLES.register(
        SLICED, Refused("expected a model whose stream is not sliced, since bases cannot be cut")
    )
