"""Loading a packed directory by ``from_pretrained``, beside the plain one, from a cold disk cache: seconds and peak.

    python bench/loading.py                  # 1 GB of random bfloat16, removed afterwards
    python bench/loading.py --gigabytes 0.2

Prints one JSON object. Each load is a fork of a process that has imported everything (``imports_s``), with the files
out of the disk cache unless it says warm; it ends when every page of every weight is in memory, which a mapping alone
is not. The parts, each alone: ``read_s`` reads the files from a cold cache, ``decode_s`` decodes a cached directory
into tensors, ``start_s`` makes the model without reading a weight.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

began = time.perf_counter()

import torch  # noqa: E402
import transformers  # noqa: E402

import gaugekit.integrations.transformers  # noqa: E402, F401 - registers our loaders
from gaugekit import codec  # noqa: E402
from gaugekit.checkpoint.reader import Checkpoint  # noqa: E402
from gaugekit.hf import loading  # noqa: E402

IMPORTS_S = time.perf_counter() - began
WIDTH, HIDDEN, VOCABULARY = 1024, 4096, 8192
LAYER_BYTES = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN)


def write(folder: Path, gigabytes: float) -> None:
    """``plain``, a Llama of Gaussian numbers, and ``packed``; forked, so that what it takes is given back."""
    layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=16,
        vocab_size=VOCABULARY, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    model.save_pretrained(folder / "plain", max_shard_size="300MB")
    codec.pack(folder / "plain", folder / "packed")


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def forget(directory: Path) -> None:
    """Takes a directory's files out of the disk cache."""
    for file in files(directory):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def status(field: str) -> int:
    """Bytes of a field of this process's status."""
    return int(re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) << 10


def load(directory: Path) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.detach().view(torch.int16).flatten()[::2048].sum()
    seconds = time.perf_counter() - start
    held = sum(parameter.nbytes for parameter in model.parameters())
    return {"s": seconds, "peak_bytes": status("VmHWM") - before, "model_bytes": held}


def read(directory: Path) -> dict[str, float]:
    start, room = time.perf_counter(), bytearray(1 << 23)
    for file in files(directory):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(room):
                pass
    return {"s": time.perf_counter() - start}


def decode(directory: Path) -> dict[str, float]:
    start = time.perf_counter()
    checkpoint = Checkpoint(directory)
    for name in checkpoint.names():
        checkpoint.read(name)
    return {"s": time.perf_counter() - start}


def make(directory: Path) -> dict[str, float]:
    start = time.perf_counter()
    loading.skeleton(directory, torch.bfloat16)
    return {"s": time.perf_counter() - start}


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns, in a fork."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=lambda: there.send(work(*arguments)))
    child.start()
    there.close()
    result = here.recv()
    child.join()
    return result


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Medians over ``rounds``, plain and packed taking turns."""
    taken: dict[str, list[dict[str, float]]] = {}
    cases = {"load": (load, True), "load_warm": (load, False), "read": (read, True), "start": (make, False)}
    for _ in range(rounds):
        for kind in ("plain", "packed"):
            for name, (work, cold) in {
                **cases,
                **({"decode": (decode, False)} if kind == "packed" else {}),
            }.items():
                if cold:
                    forget(folder / kind)
                taken.setdefault(f"{kind}_{name}", []).append(apart(work, folder / kind))
    row: dict[str, Any] = {
        "imports_s": round(IMPORTS_S, 1),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    for name, results in taken.items():
        row[f"{name}_s"] = round(statistics.median(result["s"] for result in results), 2)
    pairs = zip(taken["packed_load"], taken["plain_load"], strict=True)
    row["packed_over_plain"] = round(statistics.median(a["s"] / b["s"] for a, b in pairs), 2)
    most = max(result["peak_bytes"] for result in taken["packed_load"])
    row |= {"model_bytes": taken["packed_load"][0]["model_bytes"], "layer_bytes": LAYER_BYTES}
    row["peak_over_model_bytes"] = most - row["model_bytes"]
    for kind in ("plain", "packed"):
        row[f"{kind}_bytes"] = sum(file.stat().st_size for file in files(folder / kind))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart(write, folder, arguments.gigabytes)
        print(json.dumps(measure(folder, arguments.rounds), indent=1))


if __name__ == "__main__":
    main()
