"""What a gauge chosen for quantisation is worth: a model rounded to 4 and 3 bits from several points of its orbit.

    python bench/gauge_quantize.py                     # MiniLM, 96 sentences
    python bench/gauge_quantize.py --model smollm2 --seeds 2    # a Llama: some half an hour on two cores

Every gauge computes the same before it is rounded (``before``, float32). Then the weights of attention are rounded,
groups of 32 inputs with an offset and a scale each, by round-to-nearest or by GPTQ (Frantar et al. 2022) with the
second moments of the text. ``loss`` is the mean over ``--seeds`` draws of what is drawn in a gauge (Hadamard's signs,
where a search for a rotation begins), ``spread`` the largest distance from that mean.

MiniLM's loss is the mean of 1 − cosine to the plain model's embeddings. SmolLM2's is the mean KL a token from the plain
model on 2,048 tokens of Python's documentation, GPTQ's moments being those of other pages. Its weights were once stored
in 4 bits, so that no gauge could win: it is first trained in float32 on those other pages, until rounding to 4 bits
moves the weights of attention by more than a twentieth (``grid_error``, ‖W − rounded‖ / ‖W‖, before and after).

Gauges: "as trained"; "hadamard", a random signed Hadamard matrix a head (QuaRot; between queries and keys only where no
rotary positions stand); "rotation", the one that minimises fourth powers (OptRot's objective, heads alone); "balanced
rotation", ``gk.symmetry.QuantizationGauge()``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from documentation import learnt_and_measured
from gaugekit import samples
from gaugekit.models import AttentionView, Live
from gaugekit.symmetry import SYMMETRIES, QuantizationGauge
from run import commit, machine, save

GROUP = 32
OFF_THE_GRID = 0.05  # below it SmolLM2 as it is can be rounded nearly without loss, and no gauge could win
GAUGES = ("as trained", "hadamard", "rotation", "balanced rotation")


def hadamard(width: int) -> Tensor:
    """The Sylvester matrix over the root of its width, a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / width**0.5


def turned(view: AttentionView, generator: torch.Generator) -> AttentionView:
    """A signed Hadamard matrix for every head, between values and outputs and between queries and keys."""
    for name in ("key_bias", "value_bias"):
        view = SYMMETRIES[name].fix(view)
    for name, width in (("value_output", view.v.weight.shape[2]), ("query_key", view.k.weight.shape[2])):
        if name == "query_key" and view.rotary:
            continue
        signs = torch.randint(2, (view.groups, width, 1), generator=generator).double() * 2 - 1
        view = SYMMETRIES[name].act(view, signs * hadamard(width))
    return view


def moved(model: nn.Module, gauge: str, seed: int) -> nn.Module:
    """A copy of ``model`` at another point of its orbit."""
    model = copy.deepcopy(model)
    live, generator = Live(model), torch.Generator().manual_seed(seed)
    for layer in range(len(live) if gauge != "as trained" else 0):
        view = live.attention(layer)
        if gauge == "hadamard":
            view = turned(view, generator)
        else:
            view = QuantizationGauge(gauge == "balanced rotation", seed).layer(view)
        live.write(live.family.store(layer, view).tensors)
    return model


class Grid:
    """The 2^bits values that a group of weights [outputs, GROUP] is rounded to: one offset and one scale an output."""

    def __init__(self, weights: Tensor, bits: int):
        low, high = weights.amin(1), weights.amax(1)
        self.most = 2**bits - 1
        self.step = (high - low).clamp_min(1e-12) / self.most
        self.zero = (-low / self.step).round()

    def round(self, column: Tensor) -> Tensor:
        """The nearest value of the grid, of one number an output."""
        return (((column / self.step).round() + self.zero).clamp(0, self.most) - self.zero) * self.step


def quantized(weight: Tensor, bits: int, moments: Tensor | None) -> Tensor:
    """``weight`` [outputs, inputs] on the grids of its groups; with ``moments`` [inputs, inputs] by GPTQ."""
    rest, result = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    if moments is not None:
        damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
        factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for column in range(weight.shape[1]):
        if column % GROUP == 0:
            grid = Grid(rest[:, column : column + GROUP], bits)
        result[:, column] = grid.round(rest[:, column])
        if moments is not None:  # the error is made good in the columns to come
            error = (rest[:, column] - result[:, column]) / factor[column, column]
            rest[:, column + 1 :] -= torch.outer(error, factor[column, column + 1 :])
    return result.to(weight.dtype)


class Judge(ABC):
    """Says how far a model is from the plain one."""

    plain: nn.Module
    seen: Tensor  # bool [rows, tokens]: those of the calibration text that are no padding

    @abstractmethod
    def loss(self, model: nn.Module) -> float:
        """The distance, 0 for the plain model."""

    @abstractmethod
    def calibrate(self, model: nn.Module) -> Tensor | None:
        """Runs ``model`` over the calibration text."""

    def moments(self, model: nn.Module) -> dict[str, Tensor]:
        """The second moments of what enters every matrix of attention."""
        moments, hooks = {}, []
        for name in attention_matrices(model):

            def note(module, inputs, output, name=name):
                rows = inputs[0][self.seen].double()
                moments[name] = rows.mT @ rows / len(rows)

            hooks.append(model.get_submodule(name).register_forward_hook(note))
        self.calibrate(model)
        for hook in hooks:
            hook.remove()
        return moments


class Embeddings(Judge):
    """MiniLM's, of sentences."""

    def __init__(self, count: int):
        self.plain = AutoModel.from_pretrained(samples.minilm(), dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(samples.minilm())
        texts = samples.sentences(count)
        self.batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        self.seen = self.batch["attention_mask"].bool()
        self.expected = self.calibrate(self.plain)

    @torch.no_grad()
    def calibrate(self, model: nn.Module) -> Tensor:
        hidden = model(**self.batch).last_hidden_state * self.seen[..., None]
        return nn.functional.normalize(hidden.sum(1), dim=-1)

    def loss(self, model: nn.Module) -> float:
        cosines = (self.calibrate(model).double() * self.expected.double()).sum(-1)
        return float(1 - cosines.mean())


class Forecasts(Judge):
    """SmolLM2's next tokens, after a training that takes its weights off their grid."""

    ROWS, LENGTH = 8, 256

    def __init__(self, steps: int):
        source = samples.smollm2()
        tokenizer = AutoTokenizer.from_pretrained(source)
        learnt, measured = (torch.tensor(tokenizer(text)["input_ids"]) for text in learnt_and_measured())
        count = self.ROWS * self.LENGTH
        self.measured = measured[:count].view(self.ROWS, self.LENGTH)
        self.learnt = learnt[:count].view(self.ROWS, self.LENGTH)
        self.seen = torch.ones_like(self.learnt, dtype=torch.bool)
        self.plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self.grid_errors = [grid_error(self.plain)]
        self.train(learnt[count:], steps)
        self.grid_errors.append(grid_error(self.plain))
        with torch.no_grad():
            self.expected = self.plain(self.measured).logits.log_softmax(-1)
        told = self.expected[:, :-1].gather(2, self.measured[:, 1:, None])
        self.perplexity = float(torch.exp(-told.mean()))

    def train(self, tokens: Tensor, steps: int, rows: int = 2, length: int = 128) -> None:
        """AdamW with a cosine to zero, one place of the text after the other."""
        optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            batch = tokens[step * rows * length :][: rows * length].view(rows, length)
            self.plain(batch, labels=batch).loss.backward()
            nn.utils.clip_grad_norm_(self.plain.parameters(), 1.0)
            optimizer.step(), schedule.step(), optimizer.zero_grad()

    @torch.no_grad()
    def calibrate(self, model: nn.Module) -> None:
        model.model(self.learnt)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        forecast = model(self.measured).logits.log_softmax(-1)
        return float((self.expected.exp() * (self.expected - forecast)).sum(-1).double().mean())


def grid_error(model: nn.Module) -> float:
    """‖W − W rounded to 4 bits‖ / ‖W‖ over all matrices of attention, from the least to the greatest of each group in
    equal steps (offsets that are no multiples of the step: the grid on which SmolLM2 was stored).
    """
    errors = squares = 0.0
    for name in attention_matrices(model):
        groups = model.get_submodule(name).weight.detach().double().unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=2, keepdim=True)
        step = (high - low).clamp_min(1e-12) / 15
        errors += float(((groups - low) / step - ((groups - low) / step).round()).mul(step).square().sum())
        squares += float(groups.square().sum())
    return (errors / squares) ** 0.5


def attention_matrices(model: nn.Module) -> list[str]:
    live = Live(model)
    paths = [path for layer in range(len(live)) for path in live.family.modules(layer).values()]
    return [live.prefix + path for path in dict.fromkeys(paths)]


def rows(judge: Judge, seeds: int):
    for gauge in GAUGES:
        before, losses = [], {}
        for seed in range(seeds if gauge != "as trained" else 1):
            model = moved(judge.plain, gauge, seed)
            moments = judge.moments(model)
            before.append(judge.loss(model))
            for method in ("round-to-nearest", "GPTQ"):
                for bits in (4, 3):
                    student = copy.deepcopy(model)
                    for name, moment in moments.items():
                        weight = student.get_submodule(name).weight
                        weight.data = quantized(weight.data, bits, moment if method == "GPTQ" else None)
                    losses.setdefault(f"{method}, {bits} bits", []).append(judge.loss(student))
        for shape, several in losses.items():
            mean = statistics.mean(several)
            spread = max(abs(each - mean) for each in several)
            yield {"shape": shape, "label": gauge, "before": max(before), "loss": mean, "spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("minilm", "smollm2"), default="minilm")
    parser.add_argument("--sentences", type=int, default=96, help="MiniLM's (96)")
    parser.add_argument("--steps", type=int, default=200, help="SmolLM2's of training (200)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the rows under bench/results/")
    options = parser.parse_args()
    where = {"op": "gauge_quantize", "dtype": "float32", "machine": machine("cpu"), "commit": commit()}
    if options.model == "minilm":
        judge: Judge = Embeddings(options.sentences)
        where |= {"sentences": options.sentences}
    else:
        judge = Forecasts(options.steps)
        where |= {"steps": options.steps, "grid_error": judge.grid_errors, "perplexity": judge.perplexity}
        print(json.dumps(where), flush=True)
        if judge.grid_errors[1] < OFF_THE_GRID:
            parser.error(
                f"--steps: expected enough to reach a grid error of {OFF_THE_GRID}, got {options.steps}"
            )
    kept = []
    for row in rows(judge, options.seeds):
        kept.append(where | row | {"model": options.model, "seeds": options.seeds})
        print(
            f"{row['label']:20}{row['shape']:26}{row['before']:10.1e}{row['loss']:10.5f}{row['spread']:10.5f}",
            flush=True,
        )
    if options.save:
        save(kept, f"gauge_quantize{'' if options.model == 'minilm' else '-' + options.model}", "cpu")


if __name__ == "__main__":
    main()
