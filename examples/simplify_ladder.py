"""Takes a standard transformer block apart in the order of the paper "Simplifying Transformer Blocks", rung by rung.

One causal model on the Python source of the standard library and one masked model on its documentation, byte by byte.
Every rung sees the same batches and keeps the better of two learning rates. Shown for each: parameters of the blocks,
loss, time of a step, and at the start the signal by depth: how alike the tokens of a sequence have become (mean cosine)
and how large they are (norm). Writes JSON and, where matplotlib is installed, a plot.

    python examples/simplify_ladder.py
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import pydoc_data.topics
import statistics
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gaugekit.nn import IdentityLinear, PreLNBlock, SASBlock, SASPBlock, parameter_groups

SIZES = {
    "quick": dict(layers=3, width=16, heads=2, rows=24, batch=2, steps=4, lr=[3e-3]),
    "cpu": dict(layers=8, width=64, heads=4, rows=64, batch=8, steps=200, lr=[1e-3, 3e-3]),
}
DASHES = {"SAS": {"dashes": (8, 8)}, "SAS-P": {"dashes": (4, 8)}, "no norm": {"dashes": (1, 3)}}
MASK = 256  # the token that hides a byte
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo", "ensurepip"}


class NoSkipBlock(PreLNBlock):
    """The standard block without the skip around its attention."""

    def forward(self, x, **options):
        x = self.attention(self.norm(x), **options)
        return x + self.mlp(self.mlp_norm(x))


def shaped(width, heads, **options):
    """Shaped attention that still has value and output matrices, started at the identity and trained."""
    return SASBlock(width, heads, value=IdentityLinear(width), output=IdentityLinear(width), **options)


def rungs(size: dict) -> dict[str, tuple]:
    """Name -> (what changed, block of a layer)."""
    width, heads = size["width"], size["heads"]
    beta_ff = 0.1 * math.sqrt(18 / size["layers"])
    return {
        "Pre-LN": ("the standard block", lambda layer, **o: PreLNBlock(width, heads, **o)),
        "no skip": ("skip around attention removed", lambda layer, **o: NoSkipBlock(width, heads, **o)),
        "shaped": ("shaped attention, V and P trained", lambda layer, **o: shaped(width, heads, beta_ff=beta_ff, **o)),
        "SAS": ("V and P the identity",
                lambda layer, **o: SASBlock(width, heads, beta_ff=beta_ff, first=layer == 0, **o)),
        "SAS-P": ("MLP parallel, its skip removed",
                  lambda layer, **o: SASPBlock(width, heads, beta_ff=beta_ff, first=layer == 0, **o)),
        "no norm": ("norms removed",
                    lambda layer, **o: SASPBlock(width, heads, beta_ff=beta_ff, first=layer == 0, norm="none", **o)),
    }  # fmt: skip


class Model(nn.Module):
    """Byte and position embeddings, blocks, a last norm, tied output."""

    def __init__(self, make, size: dict, causal: bool):
        super().__init__()
        self.tokens = nn.Embedding(MASK + 1, size["width"])
        self.positions = nn.Embedding(size["rows"], size["width"])
        self.blocks = nn.ModuleList(make(layer, causal=causal) for layer in range(size["layers"]))
        bare = isinstance(self.blocks[0].norm, nn.Identity)
        self.embedding_norm = nn.LayerNorm(size["width"]) if bare else nn.Identity()
        self.norm = nn.RMSNorm(size["width"])
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def states(self, tokens):
        """The signal before the first block and after each: L + 1 tensors [B, T, D]."""
        states = [self.embedding_norm(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def forward(self, tokens):
        return self.norm(self.states(tokens)[-1]) @ self.tokens.weight.T


def source() -> bytes:
    """Python source of the standard library."""
    return b"\n".join(file.read_bytes() for file in library_files())


def documentation() -> bytes:
    """The language reference's topics and every docstring of the standard library."""
    texts = list(pydoc_data.topics.topics.values())
    for file in library_files():
        tree = ast.parse(file.read_bytes())
        nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        texts += [text for node in nodes if (text := ast.get_docstring(node))]
    return "\n\n".join(texts).encode()


def library_files() -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(library.rglob("*.py")) if not LEFT_OUT & set(f.relative_to(library).parts)]
    return files[::3]  # 4 MB are plenty


def batch(text: torch.Tensor, size: dict, seed: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [B, T]; −100 marks what the loss passes over. The same for every rung."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - size["rows"] - 1, (size["batch"], 1), generator=generator)
    rows = text[starts + torch.arange(size["rows"] + 1)].long()
    if causal:
        return rows[:, :-1], rows[:, 1:]
    tokens = rows[:, 1:]
    hidden = torch.rand(tokens.shape, generator=generator) < 0.15
    hidden[:, 0] = True  # never none
    return tokens.masked_fill(hidden, MASK), tokens.masked_fill(~hidden, -100)


def loss_of(model, pair) -> torch.Tensor:
    tokens, targets = pair
    return cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def signal(model, tokens) -> tuple[list[float], list[float]]:
    """By depth: mean cosine between two tokens of a sequence, and mean norm of a token over √D."""
    cosines, norms = [], []
    for x in model.states(tokens):
        unit = nn.functional.normalize(x, dim=-1)
        count = x.shape[1]
        cosines.append(((unit.sum(1).pow(2).sum(-1) - count) / (count * (count - 1))).mean().item())
        norms.append(x.pow(2).mean(-1).sqrt().mean().item())
    return cosines, norms


def climb(name: str, make, size: dict, text: torch.Tensor, causal: bool, seed: int, lr: float) -> dict:
    """Trains one rung; returns what the JSON keeps."""
    torch.manual_seed(seed)
    model = Model(make, size, causal)
    cut = len(text) * 19 // 20
    trained, held = text[:cut], text[cut:]
    cosine, norm = signal(model, batch(held, size, 0, causal)[0])
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.1), betas=(0.9, 0.999), eps=1e-8)
    seconds, points = [], []
    for step in range(size["steps"]):
        pair = batch(trained, size, 1_000_003 * (seed + 1) + step, causal)
        warm = max(1, size["steps"] // 20)
        share = min((step + 1) / warm, (size["steps"] - step) / max(1, size["steps"] - warm))
        for group in optimiser.param_groups:
            group["lr"] = lr * share
        clock = time.perf_counter()
        loss = loss_of(model, pair)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - clock)
        if step % max(1, size["steps"] // 12) == 0 or step + 1 == size["steps"]:
            with torch.no_grad():
                losses = [loss_of(model, batch(held, size, i, causal)).item() for i in range(8)]
            points.append((step + 1, statistics.mean(losses)))
    inside = sum(p.numel() for block in model.blocks for p in block.parameters())
    return {"rung": name, "kind": "causal" if causal else "masked", "seed": seed, "lr": lr, "block_parameters": inside,
            "validation": points, "seconds_a_step": statistics.median(seconds),
            "cosine": cosine, "norm": norm}  # fmt: skip


def plot(results: list[dict], file: Path) -> bool:
    """Loss, cosine and norm, one row a kind of model; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    kinds = ("causal", "masked")
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    colours = ("#4d4d4d", "#cc3311", "#ee9a00", "#0072b2", "#009e73", "#aa4499")
    names = list(dict.fromkeys(result["rung"] for result in results))
    for row, kind in zip(axes, kinds, strict=True):
        for result in (result for result in results if result["kind"] == kind):
            rung = result["rung"]
            style = {"color": colours[names.index(rung)], "label": rung, "linewidth": 1.5}
            dashed = style | DASHES.get(rung, {})  # these lie on one another
            row[0].plot(*zip(*result["validation"], strict=True), **style)
            row[1].plot(result["cosine"], **dashed)
            row[2].plot(result["norm"], **dashed)
        row[0].set(title=f"{kind}: validation loss (nats a byte)", xlabel="optimiser steps")
        row[1].set(
            title=f"{kind}, at the start: cosine of two tokens", xlabel="blocks passed", ylim=(-0.05, 1.05)
        )
        row[2].set(title=f"{kind}, at the start: norm / √width", xlabel="blocks passed", yscale="log")
        for axis in row:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=120)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float, nargs="+", help="each rung tries all and keeps its best")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/simplify_ladder"))
    options = parser.parse_args()
    name = "quick" if options.quick else "cpu"
    given = {"steps": options.steps, "lr": options.lr}
    size = SIZES[name] | {key: value for key, value in given.items() if value is not None}
    results = []
    print(
        f"{'model':8}{'rung':9}{'parameters':>11}{'loss':>7}{'ms/step':>9}{'rate':>7}{'cosine':>8}{'norm':>7}"
        "  what changed"
    )
    for kind, text in (("causal", source()), ("masked", documentation())):
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        for rung, (what, make) in rungs(size).items():
            tried = [climb(rung, make, size, tokens, kind == "causal", options.seed, lr) for lr in size["lr"]]
            best = min(tried, key=lambda run: run["validation"][-1][1])
            results.append(best | {"tried": {run["lr"]: run["validation"][-1][1] for run in tried}})
            print(f"{kind:8}{rung:9}{best['block_parameters']:11,}{best['validation'][-1][1]:7.3f}"
                  f"{1e3 * best['seconds_a_step']:9.1f}{best['lr']:7g}{best['cosine'][-1]:8.3f}{best['norm'][-1]:7.2f}"
                  f"  {what}", flush=True)  # fmt: skip
    directory = options.out / name
    directory.mkdir(parents=True, exist_ok=True)
    record = {**size, "threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}
    (directory / "simplify_ladder.json").write_text(json.dumps(record, indent=1))
    drawn = plot(results, directory / "simplify_ladder.png")
    print(
        f"{directory}: simplify_ladder.json"
        + (" and .png" if drawn else "; a plot needs matplotlib: pip install gaugekit[examples]")
    )


if __name__ == "__main__":
    main()
