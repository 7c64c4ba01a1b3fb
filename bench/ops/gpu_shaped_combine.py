"""On a GPU: the sweeps alone at a training shape; 3 passes over memory forward, backward 5 (dO, A, V; dA, dV)."""

import torch

from gaugekit.reference.shaped_combine import shaped_combine as reference
from registry import Call, Planned, benchmark
from rivals import check_both_ways, compiled, uniform_mean

MASK = (None, None, True, None, None, None, None)  # no v0, no lam; causal


def operator(a, v, alpha, beta, gamma):
    return torch.ops.gaugekit.shaped_combine(a, v, alpha, beta, gamma, *MASK)


def in_place(a, v, alpha, beta, gamma):
    torch.ops.gaugekit.shaped_combine_(a, v, alpha, beta, gamma, *MASK)


def backward(grad, a, v, alpha, beta, gamma):
    return torch.ops.gaugekit.shaped_combine_backward(grad, a, v, alpha, beta, gamma, *MASK)


def plain(a, v, alpha, beta, gamma):
    alpha, beta, gamma = (gain[:, None, None] for gain in (alpha, beta, gamma))
    return (beta * a.float() + alpha * v.float() - gamma * uniform_mean(v)).to(a.dtype)


def gradients(grad, a, v, alpha, beta, gamma):
    """What autograd makes of ``plain``, written out so that one compiled graph holds it."""
    count = torch.arange(1, v.shape[2] + 1, device=v.device, dtype=torch.float32)[:, None]
    grad, share = grad.float(), grad.float() / count
    suffix = share.flip(2).cumsum(2).flip(2)
    da = (beta[:, None, None] * grad).to(a.dtype)
    dv = (alpha[:, None, None] * grad - gamma[:, None, None] * suffix).to(v.dtype)
    return da, dv, *((grad * x).sum((0, 2, 3)) for x in (v.float(), a.float(), -uniform_mean(v)))


def exact(a, v, alpha, beta, gamma):
    return reference(a, v, alpha=alpha, beta=beta, gamma=gamma, causal=True)


def sweep(kind, batch, length, count, width, dtype, device):
    def rows(batch=batch, length=length, count=count):
        return torch.randn(batch, length, count, width, device=device).to(dtype).transpose(1, 2)

    def check():
        operands = [rows(1, 300, 2), rows(1, 300, 2), *(torch.rand(2, device=device) for _ in range(3))]
        check_both_ways(operator, plain, exact, operands, rows(1, 300, 2))

    def make():
        a, v, grad = rows(), rows(), rows()
        gains = [torch.rand(count, device=device) for _ in range(3)]
        forward = kind == "forward"
        operands = (a, v, *gains) if forward else (grad, a, v, *gains)
        return {
            "ours": Call(in_place if forward else backward, operands),
            "rivals": {
                "torch.compile, cumsum": Call(compiled(plain if forward else gradients), operands),
                "copy": Call(torch.Tensor.copy_, (a, v)),
            },
            "without_us": "torch.compile, cumsum",
            "check": check,
            "bytes_moved": (3 if forward else 5) * a.numel() * a.element_size(),
        }

    name = f"B{batch} T{length} D{count * width} H{count} causal {kind}"
    label = "over the core's output" if kind == "forward" else "new tensors"
    return Planned("shaped_combine", name, str(dtype).removeprefix("torch."), make, label, device)


@benchmark("shaped_combine", device="cuda")
def cases(device: str, quick: bool):
    batch, count, length, width = (1, 16, 1024, 128) if quick else (8, 16, 4096, 128)
    for dtype in (torch.bfloat16, torch.float32):
        for kind in ("forward", "backward alone"):
            yield sweep(kind, batch, length, count, width, dtype, device)
