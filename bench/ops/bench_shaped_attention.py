"""The attention sub-block of a simplified transformer (no value and no output projection) beside

the standard block (four projections), the bare minimum (two projections and torch's attention, nothing else: no
value-free block can be faster) and the same mathematics in plain torch under torch.compile, cumulative sum and all.
"""

import shutil

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import linear, scaled_dot_product_attention

import gaugekit as gk
from gaugekit.reference.shaped_attention import shaped_attention as reference
from registry import Case, benchmark

HEADS = 12


def heads(x, count=HEADS):
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def ours(x, query, key, alpha, beta, gamma):
    q, k, v = heads(linear(x, query)), heads(linear(x, key)), heads(x)
    return joined(gk.shaped_attention(q, k, v, alpha=alpha, beta=beta, gamma=gamma, causal=True))


def plain(x, query, key, alpha, beta, gamma):
    q, k, v = heads(linear(x, query)), heads(linear(x, key)), heads(x)
    a = scaled_dot_product_attention(q, k, v, is_causal=True)
    count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)
    mean = v.float().cumsum(2) / count[:, None]
    alpha, beta, gamma = (gain[:, None, None] for gain in (alpha, beta, gamma))
    return joined((beta * a.float() + alpha * v.float() - gamma * mean).to(x.dtype))


def bare(x, query, key):
    return joined(
        scaled_dot_product_attention(heads(linear(x, query)), heads(linear(x, key)), heads(x), is_causal=True)
    )


def standard(x, query, key, value, output):
    q, k, v = (heads(linear(x, weight)) for weight in (query, key, value))
    return linear(joined(scaled_dot_product_attention(q, k, v, is_causal=True)), output)


def both_ways(function, operands, weight):
    def call():
        return torch.autograd.grad(function(*operands), operands, weight)

    return call


def forward(function, operands):
    def call():
        with torch.no_grad():
            return function(*operands)

    return call


def check(operands):
    """Our block against float64, beside what plain torch makes of it in the same dtype."""

    def call():
        x, query, key, *gains = (y.detach().double().cpu() for y in operands)
        q, k, v = heads(linear(x, query)), heads(linear(x, key)), heads(x)
        exact = joined(
            reference(q, k, v, **dict(zip(("alpha", "beta", "gamma"), gains, strict=True)), causal=True)
        )
        found, naive = (forward(f, operands)().double().cpu() for f in (ours, plain))
        error, allowed = (found - exact).abs().max(), 2 * (naive - exact).abs().max()
        assert error <= allowed, f"error {error:.2e}, plain torch's {allowed / 2:.2e}"

    return call


def pinned(name):
    """torch's attention held to one kernel."""

    def core(q, k, v):
        with sdpa_kernel([getattr(SDPBackend, name)]):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return core


def flexible(length):
    """FlexAttention, compiled, with its causal block mask made once."""
    flex = torch.compile(flex_attention)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda")
    return lambda q, k, v: flex(q, k, v, block_mask=mask)


def slice_check(found, naive, operands, count):
    """One sequence, two heads, against float64: the whole would need an array of T×S for every head."""

    def call():
        x, query, key, *gains = operands
        width = x.shape[2] // count
        q, k, v = (
            heads(y[:1].double().cpu(), count)[:, :2] for y in (linear(x[:1], query), linear(x[:1], key), x)
        )
        gains = dict(
            zip(("alpha", "beta", "gamma"), (gain[:2].double().cpu() for gain in gains), strict=True)
        )
        exact = joined(reference(q, k, v, **gains, causal=True))
        outs = (f(*operands)[:1, :, : 2 * width].detach().double().cpu() for f in (found, naive))
        error, allowed = ((out - exact).abs().max() for out in outs)
        assert error <= 2 * allowed, f"error {error:.2e}, plain torch's {allowed:.2e}"

    return call


def on_gpu(quick: bool):
    """The sub-block beside the best standard ones, the fused kernel alone, and a training step of whole blocks."""
    dtype, count = torch.bfloat16, 16
    common = {
        "op": "shaped_attention", "dtype": "bfloat16", "device": "cuda", "without_us": "torch.compile, cumsum",
    }  # fmt: skip

    def random(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    def block(x, query, key, alpha, beta, gamma):
        q, k, v = heads(linear(x, query), count), heads(linear(x, key), count), heads(x, count)
        return joined(gk.shaped_attention(q, k, v, alpha=alpha, beta=beta, gamma=gamma, causal=True))

    def eager(x, query, key, alpha, beta, gamma):
        q, k, v = heads(linear(x, query), count), heads(linear(x, key), count), heads(x, count)
        a = pinned("CUDNN_ATTENTION")(q, k, v)
        number = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)[:, None]
        alpha, beta, gamma = (gain[:, None, None] for gain in (alpha, beta, gamma))
        out = beta * a.float() + alpha * v.float() - gamma * v.float().cumsum(2) / number
        return joined(out.to(x.dtype))

    def four(core):
        def call(x, query, key, value, output):
            return linear(joined(core(*(heads(linear(x, w), count) for w in (query, key, value)))), output)

        return call

    for batch, length in [(1, 512)] if quick else [(8, 4096), (32, 1024)]:
        width, tokens = 2048, batch * length
        x, weight = random(batch, length, width), random(batch, length, width)
        weights = [random(width, width) / width**0.5 for _ in range(4)]
        gains = [torch.ones(count, device="cuda") for _ in range(3)]
        operands = [y.requires_grad_() for y in [x, *weights[:2], *gains]]
        every = [x, *(w.requires_grad_() for w in weights)]
        compiled = torch.compile(eager)
        cores = {name: pinned(f"{name}_ATTENTION") for name in ("CUDNN", "FLASH")} | {
            "Flex": flexible(length)
        }
        flops = 2 * 2 * tokens * width**2 + 2 * 2 * tokens * length * width // 2
        name = f"B{batch} T{length} D{width} H{count} causal"
        for kind, run, times in (
            ("forward", lambda f, o, w: forward(f, o), 1),
            ("forward+backward", both_ways, 3),
        ):
            rivals = {f"standard block, {core}": run(four(f), every, weight) for core, f in cores.items()}
            yield Case(
                shape=f"{name} {kind}",
                ours=run(block, operands, weight),
                rivals=rivals | {"torch.compile, cumsum": run(compiled, operands, weight)},
                check=slice_check(block, eager, operands, count),
                flops=times * flops,
                label="projections included",
                **common,
            )

    batch, length, width = (1, 512, 64) if quick else (4, 4096, 64)
    q, k, v = (random(batch, length, count, width).transpose(1, 2) for _ in range(3))
    gains = {name: torch.ones(count, device="cuda") for name in ("alpha", "beta", "gamma")}

    def fused():
        return gk.shaped_attention(q, k, v, **gains, causal=True)

    def terms(q, k, v):
        number = torch.arange(1, length + 1, device="cuda", dtype=torch.float32)[:, None]
        a = pinned("CUDNN_ATTENTION")(q, k, v).float()
        return (a + v.float() - v.float().cumsum(2) / number).to(dtype)

    def fused_check():
        few = [y[:1, :2].double().cpu() for y in (q, k, v)]
        exact = reference(
            *few, **{name: gain[:2].double().cpu() for name, gain in gains.items()}, causal=True
        )
        outs = (y[:1, :2].double().cpu() for y in (fused(), terms(q, k, v)))
        error, allowed = ((out - exact).abs().max() for out in outs)
        assert error <= 2 * allowed, f"error {error:.2e}, plain torch's {allowed:.2e}"

    compiled_terms = torch.compile(terms)
    yield Case(
        shape=f"B{batch} T{length} H{count} K{width} V{width} causal forward",
        ours=fused,
        rivals={
            "cuDNN, softmax alone": lambda: pinned("CUDNN_ATTENTION")(q, k, v),
            "torch.compile, cumsum": lambda: compiled_terms(q, k, v),
        },
        check=fused_check,
        flops=2 * 2 * batch * count * length**2 * width // 2,
        label="no projections",
        **common,
    )
    yield from training_step(quick)


def training_step(quick: bool):
    """Forward and backward of whole blocks, compiled, at the paper's width and at a large one."""
    for batch, length, width, count in (
        [(2, 128, 768, 12)] if quick else [(32, 128, 768, 12), (8, 2048, 2048, 16)]
    ):
        make = {"device": "cuda", "dtype": torch.bfloat16}
        x = torch.randn(batch, length, width, **make)
        blocks = {
            "SAS": gk.nn.SASBlock(width, count, **make),
            "SAS-P": gk.nn.SASPBlock(width, count, **make),
            "Pre-LN": gk.nn.PreLNBlock(width, count, **make),
        }

        def step(block, x=x):
            run, parameters = torch.compile(block), list(block.parameters())
            return lambda: torch.autograd.grad(
                run(x).float().square().mean(), parameters, materialize_grads=True
            )

        steps = {name: step(block) for name, block in blocks.items()}

        def check(steps=steps):
            assert all(y.isfinite().all() for run in steps.values() for y in run())

        for name in ("SAS", "SAS-P"):
            yield Case(
                op="shaped_attention", dtype="bfloat16", device="cuda",
                shape=f"{name} block B{batch} T{length} D{width} H{count} training step",
                ours=steps[name], rivals={"Pre-LN block, torch.compile": steps["Pre-LN"]},
                without_us="Pre-LN block, torch.compile", check=check, label="another model: a whole block",
            )  # fmt: skip


@benchmark("shaped_attention")
def cases(device: str, quick: bool):
    if device == "cuda":
        yield from on_gpu(quick)
    batch, length, width = (1, 256, 768) if quick else (4, 512, 768)
    if device == "cuda" and not quick:
        batch, length = 32, 1024
    can_compile = device == "cuda" or shutil.which("g++") or shutil.which("clang++")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(batch, length, width, device=device).to(dtype)
        weights = [(torch.randn(width, width, device=device) / width**0.5).to(dtype) for _ in range(4)]
        gains = [torch.ones(HEADS, device=device) for _ in range(3)]
        operands = [x, *weights[:2], *gains]
        wanted = [y.clone().requires_grad_() for y in [x, *weights, *gains]]
        block, four = [*wanted[:3], *wanted[5:]], wanted[:5]
        weight = torch.randn_like(x)
        compiled = torch.compile(plain) if can_compile else None
        tokens = batch * length
        flops = 2 * 2 * tokens * width**2 + 2 * 2 * tokens * length * width // 2
        common = {
            "op": "shaped_attention",
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "without_us": "torch.compile, cumsum",
            "check": check(operands),
            "label": "projections included",
        }
        name = f"B{batch} T{length} D{width} H{HEADS} causal"
        yield Case(
            shape=f"{name} forward",
            ours=forward(ours, operands),
            rivals={
                "standard block": forward(standard, [x, *weights]),
                "bare minimum": forward(bare, operands[:3]),
                "torch.compile, cumsum": compiled and forward(compiled, operands),
            },
            flops=flops,
            **common,
        )
        yield Case(
            shape=f"{name} forward+backward",
            ours=both_ways(ours, block, weight),
            rivals={
                "standard block": both_ways(standard, four, weight),
                "bare minimum": both_ways(bare, wanted[:3], weight),
                "torch.compile, cumsum": compiled and both_ways(compiled, block, weight),
            },
            flops=3 * flops,
            **common,
        )
