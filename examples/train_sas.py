"""Trains a Pre-LN transformer and its twins without value and output matrices (SAS, SAS-P) on the same batches.

The text is the Python source of the standard library, byte by byte: nothing to download. Writes the loss against steps
and against seconds as JSON and, where matplotlib is installed, as a plot. A run that was stopped goes on from its last
checkpoint. ``--size cpu`` takes some 5 minutes on two cores; ``--size paper`` (18 layers, 768 wide) wants a GPU.

    python examples/train_sas.py
    python examples/train_sas.py --size paper --seeds 0 1 --compile
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sysconfig
import time
from pathlib import Path

import torch

from gaugekit.nn import parameter_groups

# Learning rates at "cpu" come from runs of 100 and 200 steps with seed 0, of 5e-4 to 3e-3 for Pre-LN and of 1e-3 to
# 2.4e-2 for SAS and SAS-P. There 6e-3 was as good as 3e-3 for these two; with another seed it was much worse.
SIZES = {
    "quick": dict(layers=2, width=32, heads=2, rows=16, batch=4, steps=6, lr=1e-3, beta_ff=None),
    "cpu": dict(
        layers=6,
        width=128,
        heads=4,
        rows=128,
        batch=8,
        steps=400,
        beta_ff=None,
        lr={"pre_ln": 1e-3, "sas": 3e-3, "sas_p": 3e-3},
    ),
    "paper": dict(layers=18, width=768, heads=12, rows=128, batch=128, steps=43_000, lr=1e-3, beta_ff=0.1),
}
BLOCKS = {"pre_ln": "Pre-LN", "sas": "SAS", "sas_p": "SAS-P"}
ASIDE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo", "ensurepip"}


def source_text() -> tuple[torch.Tensor, torch.Tensor]:
    """The standard library's Python source as bytes, every 20th file kept for validation."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(library.rglob("*.py")) if not ASIDE & set(f.relative_to(library).parts)]
    held = files[10::20]
    trained = [f for f in files if f not in held]
    parts = (b"\n".join(f.read_bytes() for f in some) for some in (trained, held))
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)


def batch(text: torch.Tensor, size: dict, seed: int, step: int) -> torch.Tensor:
    """[batch, rows] tokens; the same for every model, and after a restart."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    starts = torch.randint(len(text) - size["rows"], (size["batch"], 1), generator=generator)
    return text[starts + torch.arange(size["rows"])].long()


def build(block: str, size: dict, seed: int) -> torch.nn.Module:
    from gaugekit.integrations.sas import SASConfig, SASForCausalLM

    torch.manual_seed(seed)
    config = SASConfig(
        vocab_size=256, n_layer=size["layers"], n_embd=size["width"], n_head=size["heads"],
        block=block, beta_ff=size["beta_ff"], use_cache=False,
    )  # fmt: skip
    return SASForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """5 % warm-up, then straight down to 0."""
    warm = max(1, steps // 20)
    return peak * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def train(block: str, seed: int, size: dict, texts, options, directory: Path) -> dict:
    """One run, from its checkpoint where there is one; returns what the JSON keeps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = size["lr"][block] if isinstance(size["lr"], dict) else size["lr"]
    model = build(block, size, seed).to(device)
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.1), lr=peak, betas=(0.9, 0.999), eps=1e-8)
    run = {"block": block, "seed": seed, "lr": peak, "parameters": sum(p.numel() for p in model.parameters()),
           "step": [], "loss": [], "validation": [], "seconds": []}  # fmt: skip
    begin, seconds, file = 0, 0.0, directory / f"{block}-{seed}.pt"
    if file.exists():
        saved = torch.load(file, map_location=device)
        if saved["size"] != size:
            raise SystemExit(
                f"{file}: expected a run of {size}, found {saved['size']}; delete it or choose --out"
            )
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        begin, run = saved["step"], saved["run"]
        seconds = run["seconds"][-1]
    forward = torch.compile(model) if options.compile else model
    cast = torch.autocast(device, torch.bfloat16) if options.bf16 else contextlib.nullcontext()
    every = max(1, size["steps"] // options.points)
    total, count = 0.0, 0
    read = time.process_time if options.processor_time else time.perf_counter
    clock = read()
    for step in range(begin, size["steps"]):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, size["steps"], peak)
        tokens = batch(texts[0], size, seed, step).to(device, non_blocking=True)
        with cast:
            loss = forward(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        total, count = total + loss.detach(), count + 1
        if (step + 1) % every and step + 1 < size["steps"]:
            continue
        mean = float(total) / count  # waits for the GPU
        seconds += read() - clock
        run["step"].append(step + 1)
        run["loss"].append(mean)
        run["seconds"].append(seconds)
        run["validation"].append(validate(model, texts[1], size, cast, device))
        print(f"{BLOCKS[block]:7} seed {seed}  step {step + 1:6}  loss {mean:.3f}  "
              f"validation {run['validation'][-1]:.3f}  {seconds:7.1f} s", flush=True)  # fmt: skip
        state = {
            "size": size,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step + 1,
        }
        save(state | {"run": run}, file)
        total, count, clock = 0.0, 0, read()
    return run


@torch.no_grad()
def validate(model, text, size: dict, cast, device: str) -> float:
    """Mean loss of 8 fixed batches the training never sees."""
    model.eval()
    with cast:
        losses = [
            model(t, labels=t).loss.item() for t in (batch(text, size, 0, i).to(device) for i in range(8))
        ]
    model.train()
    return sum(losses) / len(losses)


def save(state: dict, file: Path) -> None:
    """Written beside, then renamed: a kill leaves the last whole checkpoint."""
    beside = file.with_suffix(".part")
    with beside.open("wb") as stream:
        torch.save(state, stream)
        os.fsync(stream.fileno())
    beside.replace(file)


def plot(runs: list[dict], file: Path, clock: str = "seconds of training") -> bool:
    """Validation loss against steps and against seconds, one line a run; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    figure, axes = plt.subplots(1, 2, layout="constrained", figsize=(9, 3.6), sharey=True)
    colours = dict(zip(BLOCKS, ("#4d4d4d", "#0072b2", "#d55e00"), strict=True))
    for axis, unit in zip(axes, ("step", "seconds"), strict=True):
        for run in runs:
            first = run["seed"] == min(r["seed"] for r in runs)
            label = f"{BLOCKS[run['block']]}, {run['parameters'] / 1e6:.2f} M parameters" if first else None
            axis.plot(run[unit], run["validation"], color=colours[run["block"]], label=label,
                      linestyle="--" if run["block"] == "sas_p" else "-", linewidth=1.5)  # fmt: skip
        axis.set_xlabel({"step": "optimiser steps", "seconds": clock}[unit])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation loss (nats a byte)")
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=130)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[name for name in SIZES if name != "quick"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--beta-ff", type=float, help="where β_FF starts; by default 0.1·√(18 / layers)")
    parser.add_argument("--points", type=int, default=40, help="points on each curve, and checkpoints")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processor-time", action="store_true", help="for a CPU that other work shares")
    parser.add_argument("--out", type=Path, default=Path("build/train_sas"))
    options = parser.parse_args()
    name = "quick" if options.quick else options.size
    given = {"steps": options.steps, "lr": options.lr, "beta_ff": options.beta_ff}
    size = SIZES[name] | {key: value for key, value in given.items() if value is not None}
    directory = options.out / name
    directory.mkdir(parents=True, exist_ok=True)
    texts = source_text()
    runs = [
        train(block, seed, size, texts, options, directory)
        for seed in options.seeds
        for block in options.blocks
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    record = {"size": name, **size, "bf16": options.bf16, "compile": options.compile, "device": device,
              "threads": torch.get_num_threads(), "processor_time": options.processor_time,
              "torch": torch.__version__, "runs": runs}  # fmt: skip
    (directory / "train_sas.json").write_text(json.dumps(record, indent=1))
    clock = "processor seconds of training" if options.processor_time else "seconds of training"
    drawn = plot(runs, directory / "train_sas.png", clock)
    print(f"\n{'block':8}{'seed':>5}{'parameters':>13}{'validation':>12}{'seconds':>9}")
    for run in runs:
        print(f"{BLOCKS[run['block']]:8}{run['seed']:5}{run['parameters']:13,}{run['validation'][-1]:12.3f}"
              f"{run['seconds'][-1]:9.1f}")  # fmt: skip
    print(
        f"\n{directory}: train_sas.json"
        + (" and train_sas.png" if drawn else "; a plot needs matplotlib: pip install gaugekit[examples]")
    )


if __name__ == "__main__":
    main()
