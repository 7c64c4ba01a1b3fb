"""On a GPU: one token decoded from one cache, beside torch's kernels over keys and values of the same layer."""

import torch

import gaugekit as gk
from gaugekit.ops.single_cache_attention import choice, use_core
from gaugekit.reference.single_cache_attention import single_cache_attention as reference
from registry import Call, Planned, benchmark
from rivals import assert_close, forward, heads, pinned

CORES = ("cuDNN", "flash", "efficient")
LABELS = {choice.TRITON: "", choice.CUDA: "CUDA's kernel"}


def random(device, *shape):
    return torch.randn(*shape, device=device).bfloat16()


def attend(core, *operands, **options):
    with use_core(core):
        return gk.single_cache_attention(*operands, **options)


def beside(core, ours, operands):
    """Triton's kernel as a rival of CUDA's: which of them a call should take, only a GPU can tell."""
    return {"Triton's kernel": Call(forward(ours(choice.TRITON)), operands)} if core == choice.CUDA else {}


def keys_and_values(core, groups):
    """Query heads of a group share its keys and values, which torch's kernels want side by side as its queries."""

    def call(q, k, v, scale):
        return core(q.unflatten(1, (groups, -1)).flatten(2, 3), k, v, scale)

    return call


def from_inputs(core, kind, batch, rows, width, count, device):
    """The layer's input as the cache: scores (W_Kᵀ q)·x_j; values slices of x, or projected afterwards."""
    slices, scale = kind == "SAS", (width // count) ** -0.5

    def ours(core):
        def step(q, key, x, value):
            absorbed = torch.einsum("bhtk,dhk->bhtd", q, key)
            out = attend(core, absorbed, x, scale=scale, slices=slices)
            return out if slices else torch.einsum("bhtd,dhv->bhtv", out, value)

        return step

    def operands(batch=batch, rows=rows):
        q, x = random(device, batch, count, 1, width // count), random(device, batch, rows, width)
        return q, random(device, width, count, width // count) / width**0.5, x

    def projected(x, weight):
        return heads(x @ weight.flatten(1), count)

    def check():
        q, key, x = operands(1, 700)
        value = torch.randn_like(key) / width**0.5
        v = heads(x, count) if slices else projected(x, value)
        absorbed = torch.einsum("bhtk,dhk->bhtd", q.double(), key.double())
        exact = reference(absorbed.cpu(), x[:, None].double().cpu(), scale=scale, slices=slices).to(device)
        exact = exact if slices else torch.einsum("bhtd,dhv->bhtv", exact, value.double())
        naive = torch.nn.functional.scaled_dot_product_attention(q, projected(x, key), v, scale=scale)
        assert_close(ours(core)(q, key, x, value), naive, exact)

    def make():
        q, key, x = operands()
        value = torch.randn_like(key) / width**0.5
        k, v = (random(device, batch, count, rows, width // count) for _ in range(2))
        rivals = {
            f"{name} over K and V": Call(forward(pinned(name, False)), (q, k, v, scale)) for name in CORES
        }
        operands_of_ours = (q, key, x, value)
        return {
            "ours": Call(forward(ours(core)), operands_of_ours),
            "rivals": rivals | beside(core, ours, operands_of_ours),
            "without_us": tuple(rivals),
            "check": check,
            "bytes_moved": x.numel() * 2,
            "goal": ("share_of_peak", 0.85),
        }

    shape = f"{kind} decode B{batch} S{rows} D{width} H{count}"
    return Planned("single_cache_attention", shape, "bfloat16", make, LABELS[core], device)


def from_values(core, batch, rows, width, count, groups, device):
    """Keys that are the values, scaled and a quarter rotated: a global layer of Gemma 4."""

    def table(rows):
        angle = torch.arange(rows, device=device)[:, None] * 1e6 ** (
            -torch.arange(width // 8, device=device) / width
        )
        return angle.cos(), angle.sin()

    def ours(core):
        return lambda q, v, gain, cos, sin: attend(core, q, v, key_gain=gain, cos=cos, sin=sin, scale=1.0)

    def operands(batch=batch, rows=rows):
        q, v = random(device, batch, count, 1, width) / 16, random(device, batch, groups, rows, width)
        return q, v, random(device, width), *table(rows)

    def check():
        q, v, gain, cos, sin = operands(1, 300)
        given = [x.double().cpu() for x in (q, v)]
        turn = {"key_gain": gain.double().cpu(), "cos": cos.double().cpu(), "sin": sin.double().cpu()}
        plain = {name: x.to(torch.bfloat16) for name, x in turn.items()}
        naive = reference(q.cpu(), v.cpu(), scale=1.0, **plain).to(device)
        assert_close(ours(core)(q, v, gain, cos, sin), naive, reference(*given, scale=1.0, **turn).to(device))

    def make():
        q, v, gain, cos, sin = operands()
        k = torch.randn_like(v)
        rivals = {
            f"{name} over K and V": Call(
                forward(keys_and_values(pinned(name, False), groups)), (q, k, v, 1.0)
            )
            for name in CORES
        }
        operands_of_ours = (q, v, gain, cos, sin)
        return {
            "ours": Call(forward(ours(core)), operands_of_ours),
            "rivals": rivals | beside(core, ours, operands_of_ours),
            "without_us": tuple(rivals),
            "check": check,
            "bytes_moved": v.numel() * 2,
            "goal": ("share_of_peak", 0.85),
        }

    shape = f"V decode B{batch} S{rows} G{groups} C{width} H{count}"
    return Planned("single_cache_attention", shape, "bfloat16", make, LABELS[core], device)


@benchmark("single_cache_attention", device="cuda")
def cases(device: str, quick: bool):
    batch, rows = (2, 1024) if quick else (32, 32768)
    for core in LABELS if choice.here(torch.device(device)) else (choice.TRITON,):
        for kind in ("SAS", "multi-head"):
            yield from_inputs(core, kind, batch, rows, 2048, 16, device)
        yield from_values(core, batch, rows // 2, 512, 16, 2, device)
