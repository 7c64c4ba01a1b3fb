"""The combine alone, the softmax output given: α·V + β·A − γ·C V, beside the same mathematics in compiled torch.

The operands lie as an attention block has them: A as torch's attention returns it, V a view of x [B, T, H·V].
"""

import shutil

import torch

from gaugekit.reference.shaped_combine import shaped_combine as reference
from registry import Case, benchmark, own_shape

SHAPE = (4, 12, 512, 64)


def plain(a, v, alpha, beta, gamma):
    """Shaped attention after the core, as a user of torch writes it: a cumulative sum over the count."""
    count = torch.arange(1, v.shape[2] + 1, device=v.device, dtype=torch.float32)
    mean = v.float().cumsum(2) / count[:, None]
    alpha, beta, gamma = (gain[:, None, None] for gain in (alpha, beta, gamma))
    return (beta * a.float() + alpha * v.float() - gamma * mean).to(a.dtype)


def ours(a, v, alpha, beta, gamma):
    return torch.ops.gaugekit.shaped_combine(
        a, v, alpha, beta, gamma, None, None, True, None, None, None, None
    )


def in_place(a, v, alpha, beta, gamma):
    torch.ops.gaugekit.shaped_combine_(a, v, alpha, beta, gamma, None, None, True, None, None, None, None)


def compiler():
    """torch.compile where it can generate code, else None: the rival is then absent."""
    return torch.compile if shutil.which("g++") or shutil.which("clang++") else None


def both_ways(function, operands, weight):
    def call():
        return torch.autograd.grad(function(*operands), operands, weight)

    return call


def check(found, operands, weight):
    def call():
        exact = [x.detach().double().requires_grad_() for x in operands]
        named = dict(zip(("a", "v", "alpha", "beta", "gamma"), exact, strict=True))
        out = reference(**{name: x.cpu() for name, x in named.items()}, causal=True)
        expected = torch.autograd.grad(out, exact, weight.double().cpu()) if weight is not None else [out]
        eps = torch.finfo(operands[0].dtype).eps
        for x, y in zip(found(), expected, strict=True):
            error = (x.double() - y.to(x.device)).abs().max()
            assert error <= 16 * eps * y.abs().max(), f"error {error:.2e}"

    return call


def combined(batch, length, heads, width, dtype, device, threads=None):
    """Forward over the core's output, and both ways into new tensors."""

    def rows():
        return torch.randn(batch, length, heads, width, device=device).to(dtype).transpose(1, 2)

    operands = [rows(), rows(), *(torch.rand(heads, device=device) for _ in range(3))]
    wanted = [x.clone().requires_grad_() for x in operands]
    weight, scratch = rows(), operands[0].clone()
    compiled = compiler() and compiler()(plain)
    size = operands[0].numel() * dtype.itemsize
    common = {
        "op": "shaped_combine",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "threads": threads,
        "without_us": "torch.compile, cumsum",
    }
    name = f"B{batch} T{length} D{heads * width} H{heads} causal"
    yield Case(
        shape=f"{name} forward",
        ours=lambda: in_place(scratch, *operands[1:]),
        rivals={
            "torch.compile, cumsum": compiled and (lambda: compiled(*operands)),
            "eager, cumsum": lambda: plain(*operands),
            "copy": lambda: scratch.copy_(operands[1]),
        },
        check=check(lambda: [ours(*operands)], operands, None),
        bytes_moved=3 * size,
        label="over the core's output",
        **common,
    )
    yield Case(
        shape=f"{name} forward+backward",
        ours=both_ways(ours, wanted, weight),
        rivals={
            "torch.compile, cumsum": compiled and both_ways(compiled, wanted, weight),
            "eager, cumsum": both_ways(plain, wanted, weight),
        },
        check=check(both_ways(ours, wanted, weight), wanted, weight),
        bytes_moved=8 * size,
        label="new tensors",
        **common,
    )


@own_shape(
    "shaped_combine", "BATCHxTOKENSxHEADSxVALUES", "4x512x12x64", torch.float32, torch.bfloat16, torch.float16
)
def own(batch: int, length: int, heads: int, width: int, dtype: torch.dtype, threads: int):
    yield from combined(batch, length, heads, width, dtype, "cpu", threads)


@benchmark("shaped_combine")
def cases(device: str, quick: bool):
    batch, heads, length, width = (1, 12, 512, 64) if quick else SHAPE
    for dtype in (torch.float32, torch.bfloat16):
        yield from combined(batch, length, heads, width, dtype, device)
