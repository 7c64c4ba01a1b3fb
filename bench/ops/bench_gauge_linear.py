"""Queries, keys and values of gauge-fixed layers in one call, beside one dense product of the same three.

A case runs through all layers of the model it is named after, weights of their own, as the model does. The rival is
what a good user writes today: the three projections as one torch linear, D to 3D. Projections by themselves are the
case of models whose keys and values are modules of their own; there the rival is a linear from D to D.
"""

import functools

import torch
from torch.nn.functional import linear

import gaugekit as gk
from gaugekit.ops.gauge_linear.layout import dense
from gaugekit.reference.gauge_linear import gauge_linear as reference
from registry import Case, benchmark, wanted

# inputs, heads, layers, rows of x (sequences × tokens)
MODELS = {
    "DeiT-tiny": (192, 3, 12, ("1x197", "8x197", "1x1")),
    "Whisper-tiny": (384, 6, 4, ("1x1500", "1x1")),
    "MiniLM": (384, 12, 6, ("1x128", "1x256", "8x128", "1x1")),
    "GPT-2": (768, 12, 12, ("1x128", "1x1024", "1x1")),
}


ROUNDS = 61


def label(threads: int) -> str:
    return "1 threads, processor time" if threads == 1 else f"{threads} threads"


def rows_of(heads: int, inputs: int, width: int):
    return torch.stack([torch.randperm(inputs)[:width] for _ in range(heads)]).int()


@functools.lru_cache(maxsize=2)
def layers(inputs: int, heads: int, count: int, device: str) -> list[dict]:
    """Weights of ``count`` layers: queries dense, keys and values (2·heads) compact, and all three as one matrix."""
    width, torch_layers = inputs // heads, []
    for _ in range(count):
        query, bias = (
            torch.randn(inputs, inputs, device=device) / inputs**0.5,
            torch.randn(inputs, device=device),
        )
        free = torch.randn(2 * heads, inputs - width, width, device=device) / inputs**0.5
        rows = rows_of(2 * heads, inputs, width).to(device)
        both = dense(free, rows).mT
        weight = torch.cat([query, both]).contiguous()
        zeros = torch.zeros(2 * inputs, device=device)
        torch_layers.append({
            "ours": (free, rows, None, query, bias), "dense": (weight, torch.cat([bias, zeros])),
            "keys": (free[:heads].clone(), rows[:heads].clone()), "dense keys": both[:inputs].contiguous(),
        })  # fmt: skip
    return torch_layers


def checked(ours, naive, exact):
    @functools.cache
    def call():
        wide = exact()
        error, allowed = ((f().double().cpu() - wide).abs().max() for f in (ours, naive))
        assert error <= 2 * allowed + 1e-6, f"error {error:.2e}, plain torch's {allowed:.2e}"

    return call


def quiet(function):
    def call():
        with torch.no_grad():
            return function()

    return call


def products(model: str, batch: str, threads: int, device: str) -> Case:
    """Queries, keys and values of every layer."""
    inputs, heads, count, _ = MODELS[model]
    x = torch.randn(*map(int, batch.split("x")), inputs, device=device)
    held, limit = layers(inputs, heads, count, device), 1 / (1 - 2 / (3 * heads))

    def few(layer=held[0]):
        return gk.gauge_linear(x[:, -3:], *layer["ours"])

    def exact(layer=held[0]):
        free, rows, _, query, bias = layer["ours"]
        some = x[:, -3:].double().cpu()
        return reference(some, free.double().cpu(), rows, None, query.double().cpu(), bias.double().cpu())

    op = (
        torch.ops.gaugekit.gauge_linear.default
    )  # as a module calls it: its rows were checked when they were set
    return Case(
        op="gauge_linear", shape=f"{model} QKV {batch} D{inputs} H{heads}", dtype="float32", device=device,
        ours=quiet(lambda: [op(x, *layer["ours"]) for layer in held]),
        rivals={
            "torch linear, D to 3D": quiet(lambda: [linear(x, *layer["dense"]) for layer in held]),
            "three torch linears": quiet(lambda: [
                [linear(x, part) for part in layer["dense"][0].chunk(3)] for layer in held]),
        },
        without_us="torch linear, D to 3D", check=checked(few, lambda: linear(x[:, -3:], *held[0]["dense"]), exact),
        flops=int(2 * x.numel() * inputs * 3 / limit) * count, threads=threads, label=label(threads),
        processor_time=threads == 1, rounds=ROUNDS,
        extra={"layers": count, "limit": limit, "goal": 1 + 0.6 * (limit - 1)},
    )  # fmt: skip


def keys_alone(model: str, batch: str, threads: int, device: str, step: bool) -> Case:
    """Keys of every layer, as a module of their own; ``step``: and the gradients of x and the weight."""
    inputs, heads, count, _ = MODELS[model]
    x = torch.randn(*map(int, batch.split("x")), inputs, device=device)
    held, limit = layers(inputs, heads, count, device), 1 / (1 - 1 / heads)
    ops = torch.ops.gaugekit
    op = ops.gauge_linear.default if step else ops.gauge_linear_forward.default  # as a module calls it

    def ours(x, free, rows):
        return op(x, free, rows, None, None, None)

    def exact():
        free, rows = held[0]["keys"]
        return reference(x[:, -3:].double().cpu(), free.double().cpu(), rows)

    seed = torch.randn_like(x)

    def both_ways(function, weights):
        leaves = [w.clone().requires_grad_(w.is_floating_point()) for w in weights]
        given = x.clone().requires_grad_()
        wanted_ones = [given, leaves[0]]
        return lambda: torch.autograd.grad(function(given, *leaves), wanted_ones, seed)

    if step:
        compact = [both_ways(ours, layer["keys"]) for layer in held]
        plain = [both_ways(linear, (layer["dense keys"],)) for layer in held]
        calls = (lambda: [call() for call in compact], lambda: [call() for call in plain])
    else:
        calls = (
            quiet(lambda: [ours(x, *layer["keys"]) for layer in held]),
            quiet(lambda: [linear(x, layer["dense keys"]) for layer in held]),
        )
    kind = "forward+backward" if step else "forward"
    check = checked(
        lambda: ours(x[:, -3:], *held[0]["keys"]), lambda: linear(x[:, -3:], held[0]["dense keys"]), exact
    )
    return Case(
        op="gauge_linear", shape=f"{model} keys {batch} D{inputs} H{heads} {kind}", dtype="float32",
        device=device, ours=calls[0], rivals={"torch linear, D to D": calls[1]},
        without_us="torch linear, D to D", check=check,
        flops=int(2 * x.numel() * inputs / limit) * count * (3 if step else 1), threads=threads,
        label=label(threads), processor_time=threads == 1, rounds=ROUNDS,
        extra={"layers": count, "limit": limit},
    )  # fmt: skip


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
