"""What several GPU benchmarks hold our kernels against, and the check of a result in float64 on the device itself."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def heads(x, count: int):
    """[B, T, H·V] -> [B, H, T, V], a view."""
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def pinned(name: str, causal: bool = True):
    """torch's attention held to one kernel; torch raises where that kernel does not take the call."""

    def core(q, k, v, scale=None):
        with sdpa_kernel([getattr(SDPBackend, KERNELS[name])]):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    return core


def compiled(function):
    """Compiled for the shapes at hand, as a user who wants speed would."""
    return torch.compile(function, dynamic=False)


def flexible(length: int, device: str):
    """FlexAttention, compiled, with its causal block mask made once."""
    flex = compiled(flex_attention)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    return lambda q, k, v: flex(q, k, v, block_mask=mask)


def forward(function):
    def call(*operands):
        with torch.no_grad():
            return function(*operands)

    return call


def both_ways(function):
    """(dO, operands...) -> the gradients of those operands that want one."""

    def call(weight, *operands):
        leaves = [x for x in operands if isinstance(x, torch.Tensor) and x.requires_grad]
        return torch.autograd.grad(function(*operands), leaves, weight)

    return call


def trained(*operands):
    return tuple(x.requires_grad_() for x in operands)


def uniform_mean(v):
    """Row t of v [..., T, V] replaced by the mean of rows 0 to t, in float32."""
    count = torch.arange(1, v.shape[-2] + 1, device=v.device, dtype=torch.float32)
    return v.float().cumsum(-2) / count[:, None]


def shaped(core):
    """β·core + α·v − γ·mean(v) with gains of [H], in plain torch."""

    def terms(q, k, v, alpha, beta, gamma):
        alpha, beta, gamma = (gain[:, None, None] for gain in (alpha, beta, gamma))
        out = beta * core(q, k, v).float() + alpha * v.float() - gamma * uniform_mean(v)
        return out.to(v.dtype)

    return terms


def exactly(function, *operands):
    """``function`` of the operands in float64; what it makes itself, such as a mask, lies on their device too."""
    with torch.device(next(x.device for x in operands if isinstance(x, torch.Tensor))):
        return function(*(x.detach().double() if isinstance(x, torch.Tensor) else x for x in operands))


def assert_close(found, naive, exact, ulps: int = 8, rounding: float = 0.0) -> None:
    """AssertionError unless ``found`` is as near to ``exact`` (float64) as twice plain torch's error in its dtype.

    ``rounding`` is allowed beside, for a sum that may cancel.
    """
    error, plain = ((x.double() - exact).abs().max().item() for x in (found, naive))
    allowed = 2 * plain + ulps * torch.finfo(found.dtype).eps * exact.abs().max().item() + rounding
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e} (plain torch's {plain:.2e})"


def check_both_ways(ours, naive, exact, operands, weight) -> None:
    """``assert_close`` of the output and of every gradient.

    The gradient of a gain [H] is a sum over all rows that may cancel: its ulps are those of its terms in quadrature.
    """
    wide = [x.detach().double().requires_grad_() for x in operands]
    with torch.device(weight.device):
        expected = exact(*wide)
        roundings = [0.0] + [_rounding_of_gain(i, exact, expected, wide, weight) for i in range(len(wide))]
    gradients = torch.autograd.grad(expected, wide, weight.double())
    results = []
    for function in (ours, naive):
        leaves = [x.detach().clone().requires_grad_() for x in operands]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, weight)])
    for found, plain, right, rounding in zip(*results, [expected, *gradients], roundings, strict=True):
        assert_close(found.detach(), plain.detach(), right.detach(), rounding=rounding)


def _rounding_of_gain(i: int, exact, expected, wide, weight) -> float:
    """Of operand i, if it is a gain: the output is linear in it, so one more of it shows the terms of its gradient."""
    if wide[i].dim() != 1:
        return 0.0
    with torch.no_grad():
        terms = (exact(*wide[:i], wide[i] + 1, *wide[i + 1 :]) - expected) * weight.double()
    size = terms.square().sum((0, 2, 3)).sqrt().max().item()
    return (torch.finfo(weight.dtype).eps + 8 * torch.finfo(torch.float32).eps) * size
