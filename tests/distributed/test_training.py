"""Training on two ranks by fully_shard and DistributedDataParallel: losses, gradients and weights of one process."""

import pytest
import torch
from torch import nn

import gaugekit as gk
from gaugekit import distributed
from gaugekit.checkpoint import resident
from gaugekit.nn.packed_matrix import PackedMatrix
from gaugekit.nn.shortcuts import PolarShortcut, TriangularShortcut
from two_ranks import on_two_ranks

STEPS = 3


class Blocks(nn.Module):
    def __init__(self, kinds=(gk.nn.SASBlock, gk.nn.SASPBlock, gk.nn.PreLNBlock)):
        super().__init__()
        self.layers = nn.ModuleList(kind(16, 4, groups=2, rotary_base=1e4) for kind in kinds)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def learn(model: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The losses of some steps; the gradients of the last stay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return losses


def mean(loss: torch.Tensor) -> torch.Tensor:
    total = loss.clone()
    torch.distributed.all_reduce(total)
    return total / 2


def whole(x: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def agree(one: nn.Module, losses, other: nn.Module, parts, rtol: float) -> None:
    torch.testing.assert_close([mean(loss) for loss in parts], losses, rtol=rtol, atol=0)
    for name, p in one.named_parameters():
        if p.requires_grad:
            q = other.get_parameter(name)
            for a, b in ((q.detach(), p.detach()), (q.grad, p.grad)):
                assert (whole(a) - b).norm() <= rtol * b.norm(), name


def halves(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.chunk(2)[torch.distributed.get_rank()] for x in batches]


def blocks_by_fully_shard(_):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    alone, shared = Blocks(), Blocks()
    shared.load_state_dict(alone.state_dict())
    batches = [torch.randn(4, 6, 16, dtype=torch.float64) for _ in range(STEPS)]
    mesh, modules = init_device_mesh("cpu", (2,)), distributed.units(shared)
    assert modules[-1] is shared and {*shared.layers} == {*modules[:-1]}
    for unit in modules:
        fully_shard(unit, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in shared.parameters())
    agree(alone, learn(alone, batches), shared, learn(shared, halves(batches)), 1e-9)


def blocks_by_heads(_):
    """Tensor parallel blocks by torch's own parallelize_module: the same batch on both ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module

    alone, shared = Blocks(), Blocks()
    shared.load_state_dict(alone.state_dict())
    plan = distributed.tensor_parallel_plan(shared)
    parallelize_module(shared, init_device_mesh("cpu", (2,)), plan)
    assert isinstance(shared.layers[0].attention.alpha, DTensor)
    assert shared.layers[0].attention.query.weight.to_local().shape == (8, 16)
    batches = [torch.randn(4, 6, 16, dtype=torch.float64) for _ in range(STEPS)]
    agree(alone, learn(alone, batches), shared, learn(shared, batches), 1e-9)
    with pytest.raises(ValueError, match="got a bare ShapedAttention"):
        distributed.tensor_parallel_plan(gk.nn.ShapedAttention(16, 4))
    with pytest.raises(
        ValueError, match="model: expected ShapedAttention or MLP modules, got a Linear without any"
    ):
        distributed.tensor_parallel_plan(nn.Linear(3, 3))


class Compact(nn.Module):
    """Projections whose gauge is fixed, and shortcuts of a sliced stream: what makes one matrix of what is stored."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(gk.nn.GaugeProjection(24, 3, 8, bias=True) for _ in range(2))
        self.turns = nn.ModuleList([TriangularShortcut(24), PolarShortcut(24, 5)])
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)
        self.double()

    def forward(self, x):
        for layer, turn in zip(self.layers, self.turns, strict=True):
            x = turn(layer(x), x)
        return x


def compact_by_fully_shard(_):
    """Also where a model that learns stays in evaluation mode: no weight is kept that has changed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, shared = Compact(), Compact()
    shared.load_state_dict(alone.state_dict())
    for unit in distributed.units(shared):
        fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))
    batches = [torch.randn(4, 24, dtype=torch.float64) for _ in range(STEPS)]
    for mode in (True, False):
        alone.train(mode), shared.train(mode)
        for _ in range(2):
            with torch.no_grad():
                outputs = [model(batches[0]) for model in (alone, shared)]
            assert (outputs[0] - outputs[1]).norm() <= 1e-12 * outputs[0].norm(), mode
            agree(alone, learn(alone, batches), shared, learn(shared, halves(batches)), 1e-9)


class Packed(nn.Module):
    """Packed layers, frozen, and a plain one behind them that learns."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(2))
        self.bfloat16()
        resident.pack(self)
        self.adapter = nn.Linear(128, 128, dtype=torch.float64)

    def forward(self, ids):
        x = self.table(ids).double()
        for layer in self.layers:
            x = x + (layer(x) if isinstance(layer.weight, PackedMatrix) else layer(x.bfloat16()).double())
        return self.adapter(x)


def twins() -> tuple[Packed, Packed]:
    alone, shared = Packed(), Packed()
    shared.load_state_dict(alone.state_dict())
    return alone, shared


def packed_by_fully_shard(_):
    """Left packed on every rank; or cut as plain matrices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh, batches = init_device_mesh("cpu", (2,)), [torch.randint(60, (4, 6)) for _ in range(STEPS)]
    alone, shared = twins()
    packed = distributed.packed_parameters(shared)
    assert packed == {shared.table.weight, *(layer.weight for layer in shared.layers)}
    for unit in distributed.units(shared):
        fully_shard(unit, mesh=mesh, ignored_params=packed)
    assert all(isinstance(layer.weight, PackedMatrix) for layer in shared.layers)
    agree(alone, learn(alone, batches), shared, learn(shared, halves(batches)), 1e-9)
    alone, shared = twins()
    for unit in distributed.units(shared):
        fully_shard(unit, mesh=mesh)
    assert all(isinstance(layer.weight, DTensor) for layer in shared.layers)
    expected, given = (model(batches[0]).detach() for model in (alone, shared))
    assert (given - expected).norm() < 2**-7 * expected.norm()  # bfloat16 inputs instead of float64


def packed_by_ddp(_):
    """Packed weights are no buffers, which would be broadcast in every forward."""
    alone, inner = twins()
    shared = nn.parallel.DistributedDataParallel(inner)
    assert not list(inner.buffers())
    batches = [torch.randint(60, (4, 6)) for _ in range(STEPS)]
    losses = learn(alone, batches), learn(shared, halves(batches))
    agree(alone, losses[0], inner, losses[1], 1e-9)


CHECKS = (
    blocks_by_fully_shard,
    blocks_by_heads,
    compact_by_fully_shard,
    packed_by_fully_shard,
    packed_by_ddp,
)


@pytest.mark.slow
def test_training_on_two_ranks(tmp_path):
    on_two_ranks(CHECKS, tmp_path)
