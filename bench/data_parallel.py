"""A training step under DistributedDataParallel on two ranks of gloo: packed weights as they are, and the same bytes as
buffers, which DDP sends in every forward. Prints one JSON object of medians.

    python bench/data_parallel.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gaugekit.checkpoint import resident


class Model(nn.Module):
    """Packed layers, and a plain one that learns; with ``buffers`` the packed parts are buffers as well."""

    def __init__(self, layers: int, width: int, buffers: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.bfloat16()
        resident.pack(self)
        self.adapter = nn.Linear(width, width, dtype=torch.bfloat16)
        if buffers:
            for number, layer in enumerate(self.layers):
                for name, part in layer.weight.value._asdict().items():
                    if isinstance(part, torch.Tensor):
                        self.register_buffer(f"{name}_{number}", part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) + x
        return self.adapter(x)


def rank(number: int, folder: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    sizes = (arguments.layers, arguments.width)
    models = {
        name: DistributedDataParallel(Model(*sizes, name == "buffers")) for name in ("packed", "buffers")
    }
    x = torch.randn(arguments.rows, arguments.width).bfloat16()
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.rounds + 1):  # the first is not counted
        for name, model in models.items():
            began = time.perf_counter()
            model(x).float().square().mean().backward()
            times[name].append((time.perf_counter() - began) * 1e3)
    if number == 0:
        held = sum(layer.weight.value.bytes for layer in models["packed"].module.layers)
        medians = {f"{name}_ms": round(statistics.median(taken[1:])) for name, taken in times.items()}
        print(json.dumps({"packed_bytes": held, **medians}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 48), ("width", 1024), ("rows", 16), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(rank, (folder, arguments), 2, start_method="fork")


if __name__ == "__main__":
    main()
