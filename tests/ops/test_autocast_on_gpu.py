"""What Python registers for GPUs computes in the dtypes it is given, like the binaries: autocast was heard before.

Operands that no kernel takes go to torch there, whose products autocast would narrow. The same functions, called on a
CPU, show whether it does.
"""

import pytest
import torch

from gaugekit.ops.nonlocal_energy import rows
from gaugekit.ops.packed_linear import cuda as packed
from gaugekit.ops.packed_linear.weight import pack_weight
from gaugekit.ops.ragged_attention import operator as ragged
from gaugekit.ops.shaped_attention import fused
from gaugekit.ops.shaped_combine import cuda as sweeps

MASK = (True, None, None, None, None)
TERMS = (None,) * 5


def normal(*shape):
    return torch.randn(*shape) / 4


def shaped_combine():
    a, v, grad = (normal(1, 2, 9, 300) for _ in range(3))
    assert not sweeps.fits(a, v)
    gains = (torch.rand(2), torch.rand(2), torch.rand(2), normal(1, 2, 9, 300), torch.rand(2))
    forward = sweeps.forward(a, v, *gains, *MASK)
    return forward, *sweeps.backward(grad, a, v, *gains, *MASK)


def shaped_attention():
    q, k, v, grad = normal(1, 2, 9, 16), normal(1, 2, 9, 16), normal(1, 2, 9, 300), normal(1, 2, 9, 300)
    out, a, lse = fused._triton(q, k, v, *TERMS, *MASK, 0.25)
    return out, *fused._triton_backward(grad, q, k, v, a, lse, *TERMS, *MASK, 0.25)


def ragged_attention():
    q, k, v, grad = normal(1, 9, 13), normal(1, 9, 13), normal(1, 2, 9, 300), normal(1, 2, 9, 300)
    a, lse = ragged._triton(q, k, v, [8, 5], *MASK, 0.25)
    return a, *ragged._triton_backward(grad, q, k, v, a, lse, [8, 5], *MASK, 0.25)


def nonlocal_energy():
    u, q, k, grad = normal(1, 2, 9, 200), normal(1, 2, 9, 16), normal(1, 2, 9, 16), normal(1, 2, 9)
    rest = (True, None, 0.25, False)
    outputs = rows._triton(u, q, k, *rest)
    return *outputs, *rows._triton_backward(grad, grad, u, q, k, *outputs, *rest)


def packed_linear():
    weight = pack_weight(normal(24, 40).bfloat16())
    return (packed.linear(normal(3, 40), *weight[:5], None, False),)


@pytest.mark.parametrize(
    "run", [shaped_combine, shaped_attention, ragged_attention, nonlocal_energy, packed_linear]
)
def test_autocast_changes_nothing(run):
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(run())
    assert all(map(torch.equal, *results))
