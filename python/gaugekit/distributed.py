"""Plans for several ranks: how models of ours are cut by torch's own tensor parallelism and ``fully_shard``.

    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    parallelize_module(model, mesh, gk.distributed.tensor_parallel_plan(model))
    for unit in gk.distributed.units(model):
        fully_shard(unit, mesh=mesh, ignored_params=gk.distributed.packed_parameters(model))

Importing this also gives torch the rules by which our operators run on DTensors (``gaugekit.ops``).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from gaugekit.nn import MLP, ShapedAttention
from gaugekit.nn.block import Block
from gaugekit.nn.packed_matrix import PackedMatrix
from gaugekit.nn.parallel import SHARES, Share
from gaugekit.ops import sharding

sharding.register()


class Shared(ParallelStyle):
    """A ``Share`` as a style of torch: its cuts become DTensors, then the module computes this rank's part."""

    def __init__(self, share: Share):
        super().__init__()
        self.share = share

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        for name, dim in self.share.cuts.items():
            whole = module._parameters.get(name)
            if whole is not None and not isinstance(whole, DTensor):
                cut = distribute_tensor(whole.detach(), device_mesh, [Shard(dim)])
                module.register_parameter(name, nn.Parameter(cut, requires_grad=whole.requires_grad))
        self.share.install(module, device_mesh)
        return module


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """{path: style} for ``torch.distributed.tensor.parallel.parallelize_module``: heads stay whole.

    Of every ``ShapedAttention`` (SAS blocks and models) and ``MLP`` in ``model``: queries, keys and gains are cut by
    heads, values that are the input itself are a slice of it, the MLP's inner width is cut. The ranks have to share the
    groups of heads evenly. What is around them (norms, embeddings, the head) is whole on every rank. transformers'
    models, converted ones too, are cut by transformers: ``from_pretrained(..., distributed_config=DistributedConfig(
    tp_plan="auto"))``. ValueError for a model without such modules, or one with packed weights in them.
    """
    plan: dict[str, ParallelStyle] = {}
    for path, module in model.named_modules():
        parts = {ShapedAttention: ("query", "key", "value", "output"), MLP: ("gate", "up", "down")}.get(
            type(module)
        )
        if parts is None:
            continue
        for name in parts:
            style = _style(getattr(module, name), name in ("output", "down"), f"{path}.{name}")
            plan |= {f"{path}.{name}".lstrip("."): style} if style else {}
        if type(module) is ShapedAttention:
            if not path:  # parallelize_module looks among children
                raise ValueError("model: expected one that holds its attention, got a bare ShapedAttention")
            plan[path] = Shared(
                SHARES[ShapedAttention]
            )  # after its parts: an identity among them is exchanged
    if not plan:
        raise ValueError(
            f"model: expected ShapedAttention or MLP modules, got a {type(model).__name__} without any"
        )
    return plan


def _style(part: nn.Module | None, adds_up: bool, path: str) -> ParallelStyle | None:
    """How a matrix is cut; None where there is none. ``adds_up``: the ranks' products are added, not put in a row."""
    if part is None or isinstance(part, nn.Identity):
        return None
    if type(part) is nn.Linear:
        return RowwiseParallel() if adds_up else ColwiseParallel()
    if adds_up or type(part) not in SHARES:
        raise ValueError(
            f"model: expected a plain matrix at {path}, got a {type(part).__name__}, which cannot be cut"
        )
    return Shared(SHARES[type(part)])


def units(model: nn.Module) -> list[nn.Module]:
    """The modules to call ``torch.distributed.fsdp.fully_shard`` on, in order: each block, then the model.

    A block is one of ours, or else a member of an ``nn.ModuleList`` that holds parameters; inner ones come first.
    """
    listed = {
        id(child) for module in model.modules() if isinstance(module, nn.ModuleList) for child in module
    }
    blocks = [
        module
        for module in model.modules()
        if (isinstance(module, Block) or id(module) in listed)
        and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        and any(True for _ in module.parameters())
    ]
    return [*(block for block in reversed(blocks) if block is not model), model]


def packed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The packed weights of ``model`` (docs/resident.md): ``fully_shard(..., ignored_params=...)`` leaves them packed
    on every rank. Without that it cuts them as plain matrices, unpacked.
    """
    return {weight for weight in model.parameters() if isinstance(weight, PackedMatrix)}
