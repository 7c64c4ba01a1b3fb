"""Queries, keys and values of gauge-fixed layers, run by the modules that ``fuse`` puts there, beside dense ones.

A case runs through all layers of the model it is named after, weights of their own, and keeps no layer's outputs for
the next, as the model does: kept, they cost page faults, a third of the time at 197 rows. Queries stay an
``nn.Linear``, keys and values are ``gk.nn.GaugeProjection``: three modules in DeiT, Whisper and MiniLM, in GPT-2, whose
projection is fused, one ``Concat`` of the three. The rival is what a good user writes today: the three projections as
one linear, D to 3D. Keys by themselves, forward and in training, are held against a linear from D to D.
"""

import copy
import functools

import torch
from torch import nn

from gaugekit.nn import Concat, GaugeProjection
from gaugekit.ops.gauge_linear import choice
from gaugekit.reference.gauge_linear import gauge_linear as reference
from registry import Case, benchmark, own_shape, wanted

# inputs, heads, layers, rows of x (sequences × tokens)
MODELS: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "DeiT-tiny": (192, 3, 12, ("1x197", "8x197", "1x1")),
    "Whisper-tiny": (384, 6, 4, ("1x1500", "1x1")),
    "MiniLM": (384, 12, 6, ("1x128", "1x256", "8x128", "1x1")),
    "GPT-2": (768, 12, 12, ("1x128", "1x1024", "1x1")),
}
FUSED = ("GPT-2",)
ROUNDS = 61
LAYERS = 6  # of a shape of a user's own


def label(threads: int) -> str:
    return "1 threads, processor time" if threads == 1 else f"{threads} threads"


def projection(inputs: int, heads: int) -> GaugeProjection:
    module = GaugeProjection(inputs, heads, inputs // heads)
    nn.init.normal_(module.free, std=inputs**-0.5)
    module.rows.copy_(torch.stack([torch.randperm(inputs)[: inputs // heads] for _ in range(heads)]))
    return module.eval()


def holding(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """The dense module of this weight [outputs, inputs]."""
    module = nn.Linear(*weight.mT.shape, bias=bias is not None)
    module.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return module.eval()


@functools.lru_cache(maxsize=2)
def layers(model: str, device: str) -> list[dict]:
    """The modules of every layer: what ``fuse`` puts there, and the dense ones of the same numbers."""
    inputs, heads, count, _ = MODELS[model]
    held = []
    with torch.no_grad(), torch.device(device):
        for _ in range(count):
            parts = [nn.Linear(inputs, inputs).eval(), projection(inputs, heads), projection(inputs, heads)]
            query, bias = parts[0], torch.cat([parts[0].bias, torch.zeros(2 * inputs)])
            held.append({
                "ours": [Concat(parts)] if model in FUSED else parts,
                "fused": holding(torch.cat([part.weight for part in parts]), bias),
                "three": [query, *(holding(part.weight) for part in parts[1:])],
            })  # fmt: skip
    return held


def outputs(modules, x) -> torch.Tensor:
    return torch.cat([module(x) for module in modules], -1)


def checked(ours, naive, exact):
    @functools.cache
    def call():
        with torch.no_grad():
            wide = exact()
            error, allowed = ((f().double().cpu() - wide).abs().max() for f in (ours, naive))
        assert error <= 2 * allowed + 1e-6, f"error {error:.2e}, plain torch's {allowed:.2e}"

    return call


def through(held, x):
    """One layer after the other; what a layer gave is free again before the next."""

    def call():
        with torch.no_grad():
            for modules in held:
                [module(x) for module in modules]

    return call


def of_projection(x: torch.Tensor, module: GaugeProjection) -> torch.Tensor:
    return reference(x.double().cpu(), module.free.double().cpu(), module.rows.cpu())


def products(model: str, batch: str, threads: int, device: str) -> Case:
    """Queries, keys and values of every layer."""
    inputs, heads, count, _ = MODELS[model]
    x = torch.randn(*map(int, batch.split("x")), inputs, device=device)
    held, limit = layers(model, device), 1 / (1 - 2 / (3 * heads))
    first, some = held[0], x[:, -3:]

    def exact():
        query, *compact = first["ours"][0] if model in FUSED else first["ours"]
        weight, bias = query.weight.double().cpu(), query.bias.double().cpu()
        return torch.cat(
            [some.double().cpu() @ weight.mT + bias] + [of_projection(some, part) for part in compact], -1
        )

    return Case(
        op="gauge_linear", shape=f"{model} QKV {batch} D{inputs} H{heads}", dtype="float32", device=device,
        ours=through([layer["ours"] for layer in held], x),
        rivals={
            "torch linear, D to 3D": through([[layer["fused"]] for layer in held], x),
            "three torch linears": through([layer["three"] for layer in held], x),
        },
        without_us="torch linear, D to 3D",
        check=checked(lambda: outputs(first["ours"], some), lambda: first["fused"](some), exact),
        flops=int(2 * x.numel() * inputs * 3 / limit) * count, threads=threads, label=label(threads),
        processor_time=threads == 1, rounds=ROUNDS,
        extra={"layers": count, "limit": limit, "goal": 1 + 0.6 * (limit - 1)} | product(held),
    )  # fmt: skip


def product(held: list[dict], training: bool = False) -> dict:
    """How the compact modules multiply on this machine."""
    if training and not choice.trains(choice.kind(), torch.float32):
        return {"product": "dense"}
    parts = [part for layer in held for module in layer["ours"] for part in module.modules()]
    chosen = {part.product[0] for part in parts if isinstance(part, GaugeProjection)}
    return {"product": " and ".join(sorted(chosen))}


def keys_alone(model: str, batch: str, threads: int, device: str, step: bool) -> Case:
    """Keys of every layer, as a module of their own; ``step``: in training, with the gradients of x and the weight."""
    inputs, heads, count, _ = MODELS[model]
    x = torch.randn(*map(int, batch.split("x")), inputs, device=device)
    held, limit = layers(model, device), 1 / (1 - 1 / heads)
    keys = [(layer["ours"][0] if model in FUSED else layer["ours"])[1] for layer in held]
    dense_keys = [layer["three"][1] for layer in held]
    seed, some = torch.randn_like(x), x[:, -3:]

    def both_ways(module, name):
        given, learning = x.clone().requires_grad_(), copy.deepcopy(module).train()
        operands = [given, getattr(learning, name)]
        return lambda: torch.autograd.grad(learning(given), operands, seed)

    def every(steps):
        def call():
            for one in steps:
                one()

        return call

    if step:
        calls = (
            every([both_ways(module, "free") for module in keys]),
            every([both_ways(module, "weight") for module in dense_keys]),
        )
    else:
        calls = (through([[module] for module in keys], x), through([[module] for module in dense_keys], x))
    kind = "forward+backward" if step else "forward"
    check = checked(lambda: keys[0](some), lambda: dense_keys[0](some), lambda: of_projection(some, keys[0]))
    return Case(
        op="gauge_linear", shape=f"{model} keys {batch} D{inputs} H{heads} {kind}", dtype="float32",
        device=device, ours=calls[0], rivals={"torch linear, D to D": calls[1]},
        without_us="torch linear, D to D", check=check,
        flops=int(2 * x.numel() * inputs / limit) * count * (3 if step else 1), threads=threads,
        label=label(threads), processor_time=threads == 1, rounds=ROUNDS,
        extra={"layers": count} | ({} if step else {"limit": limit}) | product(held, training=step),
    )  # fmt: skip


@own_shape("gauge_linear", "SEQUENCESxTOKENSxINPUTSxHEADS", "1x128x384x12", torch.float32)
def own(sequences: int, tokens: int, inputs: int, heads: int, dtype: torch.dtype, threads: int):
    if inputs % heads:
        raise ValueError(f"--shape: expected INPUTS a multiple of HEADS, got {inputs} and {heads}")
    name, batch = f"{LAYERS} layers", f"{sequences}x{tokens}"
    MODELS[name] = (inputs, heads, LAYERS, (batch,))
    layers.cache_clear()
    yield products(name, batch, threads, "cpu")
    for step in (False, True):
        yield keys_alone(name, batch, threads, "cpu", step)


@benchmark("gauge_linear")
def cases(device: str, quick: bool):
    torch.manual_seed(0)
    for model, (inputs, heads, _, batches) in MODELS.items():
        for batch in batches[:1] if quick else batches:
            for threads in (1, 2):
                tail = f"{batch} D{inputs} H{heads}"
                if wanted(f"{model} QKV {tail} float32 {label(threads)}"):
                    yield products(model, batch, threads, device)
                for step in (False, True):
                    kind = "forward+backward" if step else "forward"
                    if wanted(f"{model} keys {tail} {kind} float32 {label(threads)}"):
                        yield keys_alone(model, batch, threads, device, step)
