"""On a GPU: the attention sub-block of a simplified transformer beside the standard one, cores alone, training steps.

Every rival's attention is held to one kernel of torch's, or is FlexAttention; ours is the fused core, and beside it
stand our other cores, so that the table of ``choose_core`` can follow from the rows.
"""

import torch
from torch.nn.functional import linear

import gaugekit as gk
from gaugekit.ops.shaped_attention import use_core
from gaugekit.reference.shaped_attention import shaped_attention as reference
from registry import Call, Planned, benchmark
from rivals import (
    both_ways,
    check_both_ways,
    compiled,
    flexible,
    forward,
    heads,
    joined,
    pinned,
    shaped,
    trained,
)

WIDTH, HEADS = 2048, 16
OP, DTYPE = "shaped_attention", torch.bfloat16
COMPOSITIONS = ("torch.compile, cumsum, cuDNN", "torch.compile, cumsum, Flex")


def random(device, *shape):
    return torch.randn(*shape, device=device).to(DTYPE)


def named_cores(length, device):
    return {"cuDNN": pinned("cuDNN"), "flash": pinned("flash"), "Flex": flexible(length, device)}


def ours(core):
    """The operator on one of our cores, gains included."""

    def call(q, k, v, alpha=None, beta=None, gamma=None):
        with use_core(core):
            return gk.shaped_attention(q, k, v, alpha=alpha, beta=beta, gamma=gamma, causal=True)

    return call


def exact(q, k, v, alpha=None, beta=None, gamma=None):
    return reference(q, k, v, alpha=alpha, beta=beta, gamma=gamma, causal=True)


def value_free(attention):
    """x -> attention of two projections of x over x itself: no value and no output projection."""

    def block(x, query, key, *gains):
        q, k = (heads(linear(x, w), HEADS) for w in (query, key))
        return joined(attention(q, k, heads(x, HEADS), *gains))

    return block


def standard(core):
    def block(x, query, key, value, output):
        return linear(joined(core(*(heads(linear(x, w), HEADS) for w in (query, key, value)))), output)

    return block


def check(width, device, gains):
    """Our fused core at 2 heads and 300 rows: output and gradients."""

    def call():
        operands = [random(device, 1, 300, 2, width).transpose(1, 2) for _ in range(3)]
        operands += [torch.rand(2, device=device) + 0.5 for _ in range(3 if gains else 0)]
        core = pinned("flash")
        naive = shaped(core) if gains else core
        weight = random(device, 1, 2, 300, width)
        check_both_ways(ours("fused"), naive, exact, operands, weight)

    return call


def blocks(batch, length, kind, way, device):
    def make():
        x, weights = random(device, batch, length, WIDTH), [random(device, WIDTH, WIDTH) for _ in range(4)]
        weights = [w / WIDTH**0.5 for w in weights]
        gains = [torch.ones(HEADS, device=device) for _ in range(3)]
        first = () if way is forward else (random(device, batch, length, WIDTH),)
        simple, four = trained(x, *weights[:2], *gains), trained(x, *weights)
        cores = named_cores(length, device)
        rivals = {
            f"standard block, {name}": Call(way(standard(core)), (*first, *four))
            for name, core in cores.items()
        }
        for name in COMPOSITIONS:
            block = compiled(value_free(shaped(cores[name.rsplit(" ", 1)[1]])))
            rivals[name] = Call(way(block), (*first, *simple))
        for core in ("torch", "flex"):
            rivals[f"ours, {core} core"] = Call(way(value_free(ours(core))), (*first, *simple))
        tokens, times = batch * length, 1 if way is forward else 3
        attention = 2 * 2 * tokens * length * WIDTH // 2
        return {
            "ours": Call(way(value_free(ours("fused"))), (*first, *simple)),
            "rivals": rivals,
            "without_us": COMPOSITIONS,
            "check": check(WIDTH // HEADS, device, gains=True),
            "flops": times * 2 * 2 * tokens * WIDTH**2 + (1 if way is forward else 3.5) * attention,
            "goal": ("standard block, cuDNN", 1.25) if way is forward and length == 4096 else None,
        }

    shape = f"block B{batch} T{length} D{WIDTH} H{HEADS} causal {kind}"
    return Planned(OP, shape, "bfloat16", make, "projections included, fused core", device)


def cores(length, width, gains, kind, way, device):
    batch, count = (4, HEADS) if length > 1024 else (1, 2)

    def make():
        rows = [random(device, batch, length, count, width).transpose(1, 2) for _ in range(4)]
        terms = [torch.ones(count, device=device) for _ in range(3)] if gains else []
        first = () if way is forward else (rows[3],)
        operands = (*first, *trained(*rows[:3], *terms))
        alone = (*first, *operands[len(first) : len(first) + 3])
        torchs = named_cores(length, device)
        rivals = {f"{name}, softmax alone": Call(way(core), alone) for name, core in torchs.items()}
        without = tuple(rivals)
        if gains:
            without = COMPOSITIONS
            for name in COMPOSITIONS:
                rivals[name] = Call(way(compiled(shaped(torchs[name.rsplit(" ", 1)[1]]))), operands)
            for core in ("torch", "flex"):
                rivals[f"ours, {core} core"] = Call(way(ours(core)), operands)
        return {
            "ours": Call(way(ours("fused")), operands),
            "rivals": rivals,
            "without_us": without,
            "check": check(width, device, gains),
            "flops": (1 if way is forward else 3.5) * 2 * batch * count * length**2 * width,
        }

    shape = f"core B{batch} T{length} H{count} K{width} V{width} causal {kind}"
    label = "no projections, fused core" + (", α β γ" if gains else ", softmax alone")
    return Planned(OP, shape, "bfloat16", make, label, device)


def training_step(name, batch, length, width, count, device):
    """Forward and backward of a whole block, compiled, beside the standard one."""

    def make():
        kinds = {"SAS": gk.nn.SASBlock, "SAS-P": gk.nn.SASPBlock, "Pre-LN": gk.nn.PreLNBlock}
        x = random(device, batch, length, width)

        def step(kind):
            block = kinds[kind](width, count, device=device, dtype=DTYPE)
            run, parameters = compiled(block), list(block.parameters())

            def call(x):
                loss = run(x).float().square().mean()
                return torch.autograd.grad(loss, parameters, materialize_grads=True)

            return Call(call, (x,))

        mine, rival = step(name), step("Pre-LN")

        def finite():
            assert all(y.isfinite().all() for call in (mine, rival) for y in call())

        return {
            "ours": mine,
            "rivals": {"Pre-LN block, torch.compile": rival},
            "without_us": "Pre-LN block, torch.compile",
            "check": finite,
        }

    shape = f"{name} block B{batch} T{length} D{width} H{count} training step"
    return Planned(OP, shape, "bfloat16", make, "another model: a whole block", device)


@benchmark(OP, device="cuda")
def cases(device: str, quick: bool):
    ways = (("forward", forward), ("forward+backward", both_ways))
    for batch, length in [(1, 512)] if quick else [(8, 4096), (32, 1024)]:
        for kind, way in ways:
            yield blocks(batch, length, kind, way, device)
    for width in (64, 128):
        for gains in (False, True):
            for kind, way in ways:
                yield cores(512 if quick else 4096, width, gains, kind, way, device)
    for sizes in [(2, 128, 768, 12)] if quick else [(8, 2048, 2048, 16), (32, 128, 768, 12)]:
        for name in ("SAS", "SAS-P"):
            yield training_step(name, *sizes, device)
