"""One launch of each kernel under NVIDIA's profiler (ncu): what its registers, stalls and throughputs were.

python bench/gpu_profile.py FILE            # profiles every launch, appends one line a kernel
python bench/gpu_profile.py --launch rans   # the program that is profiled
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import gpu_ledger as ledger

SECONDS = 11  # for each of the launches
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "InstructionStats", "SchedulerStats")
# launch -> a regular expression of the kernels that count
LAUNCHES = {"rans": "rans", "packed_linear": "packed", "attention": "_shaped_attention"}


def rans():
    from gaugekit import codec
    from gaugekit.codec.tensors.device import DeviceDecoder

    blob = codec.encode((torch.randn(32 << 20) * 0.02).bfloat16())
    decoder = DeviceDecoder([blob] * 8, "cuda")
    decoder.upload()
    return decoder.decode


def packed_linear():
    from gaugekit.ops.packed_linear import pack_weight
    from gaugekit.ops.packed_linear import packed_linear as product

    weight = pack_weight((torch.randn(11008, 4096, device="cuda") * 0.02).bfloat16())
    x = torch.randn(1, 4096, device="cuda").bfloat16()
    return lambda: product(x, weight)


def attention():
    from gpu_tiles import calls

    forward, backward = calls(128)

    def both():
        forward()
        backward()

    return both


def launch(name: str) -> None:
    """Runs the launch twice to warm up, then once where the profiler looks."""
    call = {"rans": rans, "packed_linear": packed_linear, "attention": attention}[name]()
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def parsed(text: str) -> dict[str, dict[str, str]]:
    """ncu's details in CSV: for each kernel its metrics with their units; anything else it prints is passed over."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[first:]):
        if row.get("Metric Name"):
            name = f"{row['Kernel Name'].split('(')[0]} #{row['ID']}"
            kernels.setdefault(name, {})[row["Metric Name"]] = (
                f"{row['Metric Value']} {row['Metric Unit']}".strip()
            )
    return kernels


def profile(name: str, ncu: str, measures: Path) -> bool:
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = [
        ncu, "--profile-from-start", "off", "--csv", "--page", "details", "--kernel-name", f"regex:{LAUNCHES[name]}",
        *sections, sys.executable, str(Path(__file__).resolve()), "--launch", name,
    ]  # fmt: skip
    line = {"profile": name, "commit": os.environ.get("GAUGEKIT_COMMIT", "unknown")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        ledger.append(measures, line | {"error": f"stopped after {SECONDS} s"})
        return False
    kernels = parsed(done.stdout)
    if not kernels:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no output"]
        ledger.append(measures, line | {"error": last[0]})
    for kernel, metrics in kernels.items():
        ledger.append(measures, line | {"kernel": kernel, **metrics})
    return bool(kernels)


def main(measures: Path) -> int:
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not os.access(ncu, os.X_OK):
        ledger.append(measures, {"profile": "none", "error": "ncu is not here"})
        return 1
    return 0 if all([profile(name, ncu, measures) for name in LAUNCHES]) else 1


if __name__ == "__main__":
    if sys.argv[1] == "--launch":
        launch(sys.argv[2])
    else:
        sys.exit(main(Path(sys.argv[1])))
