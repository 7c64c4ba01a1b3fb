"""Trains deep transformers as they are, with NeuTRENO (λ = 0.6), and with the nonlocal energy as a term of the loss.

Two tasks that need no download: the Python source of the standard library, byte by byte, and scikit-learn's handwritten
digits for a small vision transformer (extra ``examples``). Every model of a seed starts from the same weights and sees
the same batches. Writes, as JSON and where matplotlib is installed as plots, the loss against steps and, before and
after training, by depth: how alike the tokens are (mean cosine of two) and the energy left in an attention's values.
``--size cpu`` (12 layers) takes some 5 minutes a task on two cores; ``--size gpu`` wants a GPU.

    python examples/train_neutreno.py
    python examples/train_neutreno.py --tasks vision --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional as F
from train_sas import batch, learning_rate, source_text

import gaugekit as gk

VARIANTS = {  # name: (λ, weight of the energy; below 0 it rewards spread)
    "plain": (0.0, 0.0),
    "λ = 0.6": (0.6, 0.0),
    "energy loss": (0.0, -0.1),
}
SIZES = {
    "quick": dict(layers=4, width=32, heads=2, rows=32, batch=4, steps=4, lr=1e-3),
    "cpu": dict(layers=12, width=64, heads=4, rows=64, batch=8, steps=100, lr=2e-3),
    "gpu": dict(layers=24, width=512, heads=8, rows=256, batch=64, steps=10_000, lr=5e-4),
}


class Language(nn.Module):
    """Bytes in, the next byte out."""

    causal, unit = True, "nats a byte"

    def __init__(self, size: dict, lam: float):
        super().__init__()
        self.embed, self.place = nn.Embedding(256, size["width"]), positions(size["rows"], size["width"])
        self.layers = stack(size, lam, self.causal)
        self.norm = nn.RMSNorm(size["width"])
        self.head = nn.Linear(size["width"], 256, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: torch.Tensor, states: list | None = None) -> torch.Tensor:
        x = self.layers(self.embed(tokens) + self.place, states=states)
        return self.head(self.norm(x))

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Vision(nn.Module):
    """An 8×8 picture in, as 16 tokens of 2×2 pixels; ten classes out, from the mean token."""

    causal, unit = False, "nats a picture"

    def __init__(self, size: dict, lam: float):
        super().__init__()
        self.embed, self.place = nn.Linear(4, size["width"]), positions(16, size["width"])
        self.layers = stack(size, lam, self.causal)
        self.norm = nn.RMSNorm(size["width"])
        self.head = nn.Linear(size["width"], 10)

    def forward(self, pictures: torch.Tensor, states: list | None = None) -> torch.Tensor:
        patches = pictures.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        x = self.layers(self.embed(patches) + self.place, states=states)
        return self.head(self.norm(x).mean(1))

    def loss(self, examples: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self(examples[0]), examples[1])


def positions(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(rows, width))


def stack(size: dict, lam: float, causal: bool) -> nn.Module:
    """Matrices start as N(0, 1/D): tokens then grow alike with depth."""
    options = dict(lam=lam, causal=causal, norm="rms", std=size["width"] ** -0.5)
    blocks = (gk.nn.NeutrenoBlock(size["width"], size["heads"], **options) for _ in range(size["layers"]))
    return gk.nn.ValueSharing(blocks)


class Bytes:
    def __init__(self):
        self.texts = source_text()

    def train(self, size: dict, seed: int, step: int, device: str) -> torch.Tensor:
        return batch(self.texts[0], size, seed, step).to(device)

    def held(self, size: dict, device: str) -> list:
        return [batch(self.texts[1], size, 0, i).to(device) for i in range(4)]


class Digits:
    def __init__(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        self.pictures = torch.tensor(digits.images, dtype=torch.float32)[order] / 8 - 1
        self.classes = torch.tensor(digits.target)[order]

    def train(self, size: dict, seed: int, step: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = 360 + torch.randint(len(self.classes) - 360, (4 * size["batch"],), generator=generator)
        return self.pictures[rows].to(device), self.classes[rows].to(device)

    def held(self, size: dict, device: str) -> list:
        return [(self.pictures[:360].to(device), self.classes[:360].to(device))]


TASKS = {"language": (Language, Bytes), "vision": (Vision, Digits)}


@torch.no_grad()
def by_depth(model: nn.Module, regularizer, held: list) -> dict:
    """Token cosine of what enters each layer and of the result; J/Σ‖v‖² of each layer's attention."""
    model.eval()
    states: list[torch.Tensor] = []
    inputs = held[0][0] if isinstance(held[0], tuple) else held[0]
    model(inputs, states)
    model.train()
    cosines = []
    for x in states:
        unit = F.normalize(x.float(), dim=-1)
        n = x.shape[1]
        cosines.append(((unit.sum(1).square().sum(-1) - n) / (n * (n - 1))).mean().item())
    energies = [energy.mean().item() for energy in regularizer.energies.values()]
    return {"cosine": cosines, "energy": energies}


@torch.no_grad()
def validate(model: nn.Module, held: list) -> float:
    model.eval()
    losses = [model.loss(examples).item() for examples in held]
    model.train()
    return statistics.fmean(losses)


def train(task: str, variant: str, seed: int, size: dict, data, points: int) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lam, weight = VARIANTS[variant]
    torch.manual_seed(seed)
    model = TASKS[task][0](size, lam).to(device)
    regularizer = gk.nn.NonlocalRegularizer(model, weight=weight, relative=True)
    optimiser = torch.optim.AdamW(gk.nn.parameter_groups(model, 0.1), lr=size["lr"], betas=(0.9, 0.99))
    held = data.held(size, device)
    parameters = sum(p.numel() for p in model.parameters())
    run = {"task": task, "variant": variant, "seed": seed, "parameters": parameters}
    run |= {"initial": by_depth(model, regularizer, held), "step": [0], "validation": [validate(model, held)]}
    every, begin = max(1, size["steps"] // points), time.perf_counter()
    if not weight:
        regularizer.remove()
    for step in range(size["steps"]):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, size["steps"], size["lr"])
        loss = model.loss(data.train(size, seed, step, device))
        (loss + regularizer() if weight else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % every == 0 or step + 1 == size["steps"]:
            run["step"].append(step + 1)
            run["validation"].append(validate(model, held))
    run["seconds"] = time.perf_counter() - begin
    if not weight:
        regularizer = gk.nn.NonlocalRegularizer(model, relative=True)
    run["trained"] = by_depth(model, regularizer, held)
    print(f"{task:9} {variant:12} seed {seed}  validation {run['validation'][-1]:.3f}  last cosine "
          f"{run['initial']['cosine'][-1]:.2f} at the start, {run['trained']['cosine'][-1]:.2f} trained  "
          f"{run['seconds']:5.1f} s", flush=True)  # fmt: skip
    return run


def at_the_start(seeds, source: torch.Tensor) -> list[dict]:
    """Token cosine after each of 4 layers, 128 wide, before any training: on English text and on Python source.

    16 rows of 64 bytes; embeddings N(0, 1), matrices N(0, 1/D), RMS norms, causal. The mean is over pairs of two
    different tokens of a row.
    """
    size, rows = dict(layers=4, width=128, heads=4, rows=64, batch=16), []
    english = "\n".join(topics.values()).encode()
    texts = {"English": torch.frombuffer(bytearray(english), dtype=torch.uint8), "source": source}
    for (name, text), lam in itertools.product(texts.items(), (0.0, 0.6)):
        cosines = []
        for seed in seeds:
            torch.manual_seed(seed)
            model = Language(size, lam)
            regularizer = gk.nn.NonlocalRegularizer(model, relative=True)
            cosines.append(by_depth(model, regularizer, [batch(text, size, seed, 0)])["cosine"][1:])
        rows.append({"text": name, "lam": lam, "cosine": cosines})
        mean = ", ".join(f"{statistics.fmean(layer):.2f}" for layer in zip(*cosines, strict=True))
        last = [layers[-1] for layers in cosines]
        print(f"4 layers at the start, {name:7}, λ = {lam}: cosine after each {mean}; "
              f"last {min(last):.2f} to {max(last):.2f}")  # fmt: skip
    return rows


def plot(runs: list[dict], task: str, file: Path) -> bool:
    """Validation loss, token cosine by depth, energy by depth: a line a variant, a band over the seeds."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for (variant, _), colour in zip(VARIANTS.items(), ("#4d4d4d", "#0072b2", "#d55e00"), strict=True):
        mine = [run for run in runs if run["variant"] == variant]

        def draw(axis, x, curves, style="-", label=None, colour=colour):
            low, high = (list(map(pick, zip(*curves, strict=True))) for pick in (min, max))
            mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            axis.plot(x, mean, style, color=colour, label=label, linewidth=1.6)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)

        if not mine:
            continue
        draw(axes[0], mine[0]["step"], [run["validation"] for run in mine], label=variant)
        for axis, what in ((axes[1], "cosine"), (axes[2], "energy")):
            depth = range(1 if what == "energy" else 0, len(mine[0]["trained"]["cosine"]))
            draw(axis, depth, [run["initial"][what] for run in mine], "--", f"{variant}, at the start")
            draw(axis, depth, [run["trained"][what] for run in mine], "-", f"{variant}, trained")
    axes[0].set(xlabel="optimiser steps", ylabel=f"validation loss ({TASKS[task][0].unit})")
    axes[1].set(xlabel="layers passed", ylabel="mean cosine of two tokens", ylim=(None, 1))
    axes[2].set(xlabel="layer", ylabel="energy of the values, J / Σ‖v‖²")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[name for name in SIZES if name != "quick"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--points", type=int, default=10, help="points on each curve")
    parser.add_argument("--out", type=Path, default=Path("build/train_neutreno"))
    options = parser.parse_args()
    name = "quick" if options.quick else options.size
    given = {"steps": options.steps, "lr": options.lr}
    size = SIZES[name] | {key: value for key, value in given.items() if value is not None}
    seeds = options.seeds[:1] if options.quick else options.seeds
    directory = options.out / name
    directory.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    for task in options.tasks:
        if task == "vision" and importlib.util.find_spec("sklearn") is None:
            print("vision: left out, it needs scikit-learn (pip install gaugekit[examples])")
            continue
        data = TASKS[task][1]()
        record = {"task": task, "size": name, **size, "device": device, "threads": torch.get_num_threads(),
                  "torch": torch.__version__}  # fmt: skip
        if task == "language":
            record["four layers at the start"] = at_the_start(
                range(1 if options.quick else 10), data.texts[0]
            )
        record["runs"] = []
        for seed in seeds:
            for variant in VARIANTS:
                record["runs"].append(train(task, variant, seed, size, data, options.points))
                (directory / f"train_neutreno_{task}.json").write_text(json.dumps(record, indent=1))
        drawn = plot(record["runs"], task, directory / f"train_neutreno_{task}.png")
        print(
            f"{directory}: train_neutreno_{task}.json"
            + (" and .png" if drawn else "; a plot needs matplotlib: pip install gaugekit[examples]")
        )


if __name__ == "__main__":
    main()
