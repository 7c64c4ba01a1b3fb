"""What training does along directions that no output depends on, and whether to stop it pays.

    python bench/gauge_training.py                  # a byte-level GPT-2 of two layers, some minutes on two cores
    python bench/gauge_training.py --steps 600 --save

Between values and outputs of a head any invertible E can be put: W_V E, E⁻¹ W_O (gk.symmetry). Three things are shown.

``gradient``: the part of the gradient along these orbits, ‖W_Vᵀ∂W_V − ∂W_O W_Oᵀ‖ over the norms of its two terms, in
float64. It is rounding: a gradient step never moves along an orbit, to first order.

``drift``: what nevertheless moves. ``imbalance`` is ‖W_VᵀW_V − W_O W_Oᵀ‖ over ‖W_V‖² + ‖W_O‖², which gradient flow
conserves; before and after the steps of each optimizer, from a start pushed off balance by a random element.

``training``: the same function trained from several points of its orbit (``gauge``), by AdamW with a plain weight
decay, with none, and with one that is the same all over an orbit (``decay``: "quotient", of 2 ‖W_V W_O‖_* a head, the
least that ‖W_V‖² + ‖W_O‖² comes to there). ``loss`` is that of the last tenth of the steps, ``held_out`` that of text
which was not learnt, in nats a byte; mean over ``seeds`` starts, ``spread`` the largest distance from it.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from documentation import learnt_and_measured
from gaugekit.models import Live
from gaugekit.symmetry import SYMMETRIES, GaugeFix
from run import commit, machine, save

WIDTH, LAYERS, HEADS, LENGTH, ROWS = 64, 2, 4, 64, 16
RATE, DECAY = 3e-3, 0.1
GROUP = SYMMETRIES["value_output"]
COLUMNS = ("shape", "label", "before", "after", "loss", "held_out", "spread")


def fresh(seed: int) -> GPT2LMHeadModel:
    """A small GPT-2 over bytes, float64, nothing dropped."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def moved(model: nn.Module, gauge: str) -> nn.Module:
    """A copy of ``model`` that computes the same from another point of its orbit."""
    model = copy.deepcopy(model)
    live = Live(model)
    generator = torch.Generator().manual_seed(0)
    for layer in range(len(live)):
        view = live.attention(layer)
        if gauge == "identity block":
            view = GaugeFix().layer(view)
        elif gauge == "turned heads":
            view = GaugeFix("triangular").layer(view)
        elif gauge == "random element":
            view = GROUP.act(view, GROUP.random(view, generator))
        elif gauge != "as drawn":
            raise ValueError(f"gauge: got {gauge!r}")
        live.write(live.family.store(layer, view).tensors)
    return model


def pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The fused projection and the output projection of every layer, as they are stored: [D, 3D] and [D, D]."""
    return [(block.attn.c_attn.weight, block.attn.c_proj.weight) for block in model.transformer.h]


def heads(fused: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(W_V [H, D, V], W_O [H, V, D]) of a layer, or their gradients."""
    return fused[:, 2 * WIDTH :].unflatten(1, (HEADS, -1)).movedim(1, 0), out.unflatten(0, (HEADS, -1))


def along_the_orbit(model: nn.Module) -> float:
    """The largest part of the gradient along value_output, of any layer, over the norms of its two terms."""
    shares = []
    for fused, out in pairs(model):
        (value, output), (value_grad, output_grad) = heads(fused, out), heads(fused.grad, out.grad)
        left, right = value.mT @ value_grad, output_grad @ output.mT
        shares.append(float(((left - right).norm() / (left.norm() + right.norm())).detach()))
    return max(shares)


def imbalance(model: nn.Module) -> float:
    """‖W_VᵀW_V − W_O W_Oᵀ‖ over ‖W_V‖² + ‖W_O‖², over all heads together."""
    distance = size = 0.0
    for fused, out in pairs(model):
        value, output = heads(fused.detach(), out.detach())
        distance += float((value.mT @ value - output @ output.mT).square().sum())
        size += float(value.square().sum() + output.square().sum()) ** 2
    return (distance / size) ** 0.5


def quotient(model: nn.Module) -> Tensor:
    """Σ 2 ‖W_V W_O‖_* over heads: the least of ‖W_V‖² + ‖W_O‖² on the orbit."""
    total = torch.zeros((), dtype=torch.float64)
    for fused, out in pairs(model):
        value, output = heads(fused, out)
        left, right = torch.linalg.qr(value).R, torch.linalg.qr(output.mT).R
        total = total + 2 * torch.linalg.svdvals(left @ right.mT).sum()
    return total


def batches(text: bytes, seed: int):
    """Endless batches [B, T] of bytes."""
    ids, generator = torch.tensor(list(text)), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - LENGTH, (ROWS, 1), generator=generator)
        yield ids[starts + torch.arange(LENGTH)]


def optimizer_of(model: nn.Module, kind: str, decay: str) -> torch.optim.Optimizer:
    """``decay`` "plain" reaches every matrix, "quotient" all of them but values and outputs, "none" nothing."""
    if kind == "SGD":
        return torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=DECAY if decay == "plain" else 0.0)
    spared = {id(weight) for pair in pairs(model) for weight in pair} if decay == "quotient" else set()
    matrices = [p for p in model.parameters() if p.dim() > 1 and id(p) not in spared]
    rest = [p for p in model.parameters() if p.dim() == 1 or id(p) in spared]
    amount = 0.0 if decay == "none" else DECAY
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": amount}, {"params": rest, "weight_decay": 0.0}], lr=RATE
    )


def train(model: nn.Module, text: bytes, steps: int, *, kind: str = "AdamW", decay: str, seed: int) -> float:
    """Trains in place; the mean loss of the last tenth of the steps."""
    optimizer, losses = optimizer_of(model, kind, decay), []
    for _, batch in zip(range(steps), batches(text, seed), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        losses.append(float(loss.detach()))
        if decay == "quotient":  # half of it: AdamW's decay is the gradient of half the squared norm
            loss = loss + 0.5 * DECAY * quotient(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return statistics.mean(losses[-max(1, steps // 10) :])


@torch.no_grad()
def held_out(model: nn.Module, text: bytes) -> float:
    source = batches(text, seed=1)
    return statistics.mean(
        float(model(input_ids=b, labels=b).loss) for b, _ in zip(source, range(16), strict=False)
    )


def rows(steps: int, seeds: int):
    learnt, measured = (part.encode() for part in learnt_and_measured())
    model = fresh(0)
    batch = next(batches(learnt, 0))
    model(input_ids=batch, labels=batch).loss.backward()
    yield {"shape": "gradient", "label": "along the orbit", "after": along_the_orbit(model)}
    for kind, decay in (("SGD", "none"), ("SGD", "plain"), ("AdamW", "none"), ("AdamW", "plain")):
        student = moved(fresh(0), "random element")
        before = imbalance(student)
        train(student, learnt, steps, kind=kind, decay=decay, seed=0)
        label = f"{kind}, {decay if decay != 'none' else 'no'} decay"
        yield {"shape": "drift", "label": label, "before": before, "after": imbalance(student)}
    for gauge in ("as drawn", "random element", "identity block", "turned heads"):
        for decay in ("none", "plain", "quotient"):
            losses, elsewhere = [], []
            for seed in range(seeds):
                student = moved(fresh(seed), gauge)
                losses.append(train(student, learnt, steps, decay=decay, seed=seed))
                elsewhere.append(held_out(student, measured))
            mean = statistics.mean(elsewhere)
            yield {
                "shape": "training", "label": f"{gauge}, {decay} decay", "loss": statistics.mean(losses),
                "held_out": mean, "spread": max(abs(loss - mean) for loss in elsewhere),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="keep the rows under bench/results/")
    options = parser.parse_args()
    where = {"op": "gauge_training", "dtype": "float64", "machine": machine("cpu"), "commit": commit()}
    kept = []
    for row in rows(options.steps, options.seeds):
        kept.append(where | row | {"steps": options.steps, "seeds": options.seeds})
        cells = (
            f"{row[name]:.3g}" if isinstance(row.get(name), float) else row.get(name, "") for name in COLUMNS
        )
        print("  ".join(str(cell).ljust(30 if i == 1 else 10) for i, cell in enumerate(cells)), flush=True)
    if options.save:
        save(kept, "gauge_training", "cpu")


if __name__ == "__main__":
    main()
