"""Attention whose scores have a low rank from the start: what it saves and costs, and what theory says of scarce data.

1. A small language model (bytes of Python's documentation) with queries and keys as wide as the values, half and a
   quarter as wide: held-out loss, time of a step, bytes of cache a token.
2. One attention layer learns a teacher of rank 2 from n examples, at ranks 1 to 16: the gap between held-out and
   training loss, beside the covering-number bound of gaugekit.rank (our derivation; far above 1, so only its shape can
   be compared).

Writes low_rank.json and, where matplotlib is installed, low_rank.png (into build/train_low_rank, or --out).

    python examples/train_low_rank.py            # some 5 minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import gaugekit as gk
from gaugekit import samples

WIDTH, HEADS, ROWS = 128, 4, 128  # of the language model: heads 32 wide
D, V, TOKENS, TEACHER_RANK = 16, 8, 12, 2  # of the single layer


class LanguageModel(nn.Module):
    def __init__(self, rank: int, layers: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(ROWS, WIDTH)
        self.blocks = nn.ModuleList(gk.nn.PreLNBlock(WIDTH, HEADS, key_width=rank) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batch(text, generator, size=8):
    starts = torch.randint(len(text) - ROWS - 1, (size, 1), generator=generator)
    piece = text[starts + torch.arange(ROWS + 1)].long()
    return piece[:, :-1], piece[:, 1:]


def loss_of(model, tokens, goals):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), goals.flatten())


def language(rank: int, steps: int, layers: int) -> dict:
    """Trains one model; the same batches for every rank."""
    lines = samples.sentences(1000)
    train, held = (
        torch.frombuffer(bytearray("\n".join(part).encode()), dtype=torch.uint8)
        for part in (lines[:900], lines[900:])
    )
    torch.manual_seed(0)
    model, generator = LanguageModel(rank, layers), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(gk.nn.parameter_groups(model, 0.1), lr=1e-3)
    times = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / 20, (steps - step) / steps)
        begin = time.perf_counter()
        loss_of(model, *batch(train, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        held_out = statistics.mean(float(loss_of(model, *batch(held, generator))) for _ in range(8))
    return {
        "rank": rank,
        "held_out_loss": held_out,
        "step_ms": 1000 * statistics.median(times),
        "cache_bytes_a_token": layers * HEADS * (rank + WIDTH // HEADS) * 4,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


class Layer(nn.Module):
    """f(X) = wᵀ tanh(W_Vᵀ Xᵀ softmax(X W_K W_Qᵀ x_0)): the layer that the bound speaks of."""

    def __init__(self, rank: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, out, bias=False) for out in (rank, rank, V))
        self.readout = nn.Parameter(torch.randn(V) / V**0.5)

    def forward(self, x):
        q, k, v = self.query(x[:, :1]), self.key(x), self.value(x)
        y = gk.shaped_attention(q[:, None], k[:, None], v[:, None], scale=1.0)
        return torch.tanh(y[:, 0, 0]) @ self.readout


def single_layer(rank: int, n: int, seed: int, steps: int) -> dict:
    torch.manual_seed(1000 * seed + n)
    teacher = Layer(TEACHER_RANK).requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.mul_(3)
    x = nn.functional.normalize(torch.randn(n + 1000, TOKENS, D), dim=-1)
    goals = teacher(x) + 0.1 * torch.randn(len(x))
    student = Layer(rank)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(steps):
        (student(x[:n]) - goals[:n]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        train, held = ((student(part) - goal).abs().clamp(max=1).mean().item()
                       for part, goal in ((x[:n], goals[:n]), (x[n:], goals[n:])))  # fmt: skip
        scores = student.query.weight.T @ student.key.weight
        bound = gk.rank.covering_bound(
            scores, student.value.weight.T, student.readout, n, input_norm=1.0, rank=rank
        )
    return {"rank": rank, "n": n, "seed": seed, "train": train, "held_out": held, "gap": held - train,
            "bound": bound["gap"]}  # fmt: skip


def mean(rows: list[dict], what: str, **where) -> float:
    return statistics.mean(row[what] for row in rows if all(row[k] == v for k, v in where.items()))


def plot(models: list[dict], rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    axes[0].plot([m["rank"] for m in models], [m["held_out_loss"] for m in models], "o-")
    axes[0].set(
        xlabel="rank of the scores, of 32", ylabel="held-out loss (nats a byte)", title="language model"
    )
    ranks = sorted({row["rank"] for row in rows})
    for n in sorted({row["n"] for row in rows}):
        for axis, what in ((axes[1], "held_out"), (axes[2], "gap")):
            axis.plot(ranks, [mean(rows, what, n=n, rank=r) for r in ranks], "o-", label=f"n = {n}")
    n = max(row["n"] for row in rows)
    bounds = [mean(rows, "bound", n=n, rank=r) for r in ranks]
    scale = mean(rows, "gap", n=n, rank=ranks[-1]) / bounds[-1]
    axes[2].plot(ranks, [scale * b for b in bounds], "k--", label=f"bound, n = {n}, times {scale:.1e}")
    axes[1].set(xlabel="rank", ylabel="held-out error", title="one layer, teacher of rank 2", xscale="log")
    axes[2].set(xlabel="rank", ylabel="held-out − training error", title="the gap", xscale="log")
    axes[2].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=110)
    print("plot:", file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("build/train_low_rank"))
    options = parser.parse_args()
    steps, layers = (3, 1) if options.quick else (200, 2)
    models = []
    for rank in (32, 16, 8):
        models.append(language(rank, steps, layers))
        model = models[-1]
        print(
            f"rank {rank:2} of 32  held-out loss {model['held_out_loss']:.3f}  step {model['step_ms']:.0f} ms  "
            f"cache {model['cache_bytes_a_token']} bytes a token  {model['parameters']:,} parameters",
            flush=True,
        )
    ranks, sizes, seeds = ((1, 4), (32, 128), 1) if options.quick else ((1, 2, 4, 8, 16), (32, 128, 512), 3)
    rows = [single_layer(rank, n, seed, 10 if options.quick else 300)
            for n in sizes for rank in ranks for seed in range(seeds)]  # fmt: skip
    print(
        "one layer, teacher of rank 2; held-out error, and in brackets how far it lies above the training error"
    )
    for n in sizes:
        cells = "  ".join(f"r={r} {mean(rows, 'held_out', n=n, rank=r):.3f} ({mean(rows, 'gap', n=n, rank=r):.3f})"
                          for r in ranks)  # fmt: skip
        print(f"n = {n:4}  {cells}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "low_rank.json").write_text(
        json.dumps({"language": models, "single_layer": rows}, indent=1)
    )
    try:
        plot(models, rows, options.out / "low_rank.png")
    except ImportError:
        print("a plot needs matplotlib: pip install gaugekit[examples]")


if __name__ == "__main__":
    main()
