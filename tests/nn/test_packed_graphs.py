"""Packed layers in compiled and exported graphs of any number of rows, and under torch's data-parallel wrappers."""

import subprocess
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from gaugekit.checkpoint import resident
from gaugekit.nn import PackedLinear
from gaugekit.nn.packed_matrix import PackedMatrix
from warm import python


class Model(nn.Module):
    """A packed table, a packed layer and a head tied to the table, with a plain layer between to train."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 128)
        self.inner = nn.Linear(128, 128)
        self.head = nn.Linear(128, 60, bias=False)
        self.head.weight = self.table.weight
        self.bfloat16()
        resident.pack(self)
        self.adapter = nn.Linear(128, 128, dtype=torch.bfloat16)

    def forward(self, ids):
        return self.head(self.adapter(self.inner(self.table(ids))))


def test_one_compiled_graph_serves_any_number_of_rows():
    model, counter = Model(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for rows in (7, 40, 65, 300):  # on both sides of where the product goes over to decoding first
        ids = torch.arange(rows) % 60
        assert torch.equal(compiled(ids), model(ids))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_dynamic_rows(strict):
    model, rows = Model(), torch.export.Dim("rows", min=1, max=4096)
    exported = torch.export.export(
        model, (torch.arange(9),), dynamic_shapes={"ids": {0: rows}}, strict=strict
    ).module()
    for count in (1, 9, 64, 65, 200):
        ids = torch.arange(count) % 60
        assert torch.equal(exported(ids), model(ids))


def test_gradients_in_a_compiled_graph():
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for one in (model, compiled):
        model.zero_grad()
        one(torch.arange(5)).float().square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 3 and all(map(torch.equal, *gradients))


def _train(wrapped: nn.Module, rank: int) -> None:
    """Two steps on other tokens on each rank; the outputs are the same on both then."""
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    for step in range(2):
        wrapped(torch.arange(10) + rank + step).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    outputs = [torch.empty(10, 60) for _ in range(2)]
    torch.distributed.all_gather(outputs, wrapped(torch.arange(10)).detach().float())
    assert torch.equal(*outputs)


def _replica(rank: int, meeting: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = Model()
    first = model.inner.to_linear().weight.detach()
    torch.distributed.broadcast(first, 0)
    assert torch.equal(model.inner.weight, first) == (rank == 0)
    with pytest.raises(RuntimeError, match="got a packed weight"):
        torch.distributed.broadcast(model.inner.weight, 0)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert not list(model.buffers()), "buffers would be broadcast in every forward"
    assert isinstance(model.inner.weight, PackedMatrix) and model.head.packed is model.table.packed
    assert torch.equal(model.inner.weight, first)
    _train(wrapped, rank)
    sharded = fully_shard(Model(), mesh=init_device_mesh("cpu", (2,)))
    _train(sharded, rank)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_replicas_start_from_the_first_rank_s_weights(tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, '..'); import test_packed_graphs as t\n"
        "torch.multiprocessing.start_processes(t._replica, sys.argv[1:], 2, start_method='fork')"
    )
    command = [*python(), "-W", "ignore", "-c", code, str(tmp_path / "meeting")]
    subprocess.run(command, cwd=Path(__file__).parent, check=True)


def test_a_wrapper_that_cuts_parameters_in_place_is_refused():
    packed = PackedLinear.from_linear(nn.Linear(128, 64, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"expected \[64, 128\], got \[8192\].*fully_shard"):
        packed.weight.data = torch.zeros(64 * 128, dtype=torch.bfloat16)
