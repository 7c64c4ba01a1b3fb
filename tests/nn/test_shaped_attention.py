"""ShapedAttention: the paper's equation, the identity at the start, every option against plain torch in float64."""

import copy

import pytest
import torch

from gaugekit import nn
from gaugekit.nn.rotary import rotate
from gaugekit.reference.shaped_attention import shaped_attention as reference
from helpers import assert_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randomised(module, std=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def written_out(module, x, positions=None, **mask):
    """The module's formula with every matrix written out, in x's dtype."""
    batch, rows, width = x.shape
    q = x @ module.query.weight.T
    k = x @ module.key.weight.T
    v = x if module.value is None else module.value(x)
    q, k = (y.view(batch, rows, -1, module.key_width).transpose(1, 2) for y in (q, k))
    v = v.view(batch, rows, -1, width // module.heads).transpose(1, 2)
    if module.rotary_base is not None:
        q, k = (turned(y, positions, module.rotary_base) for y in (q, k))
    k = k.repeat_interleave(v.shape[1] // k.shape[1], dim=1)
    gains = {name: getattr(module, name) for name in ("alpha", "beta", "gamma") if module.shaped}
    y = reference(q, k, v, causal=module.causal, window=module.window, **gains, **mask)
    y = y.transpose(1, 2).reshape(batch, rows, width)
    return y if module.output is None else module.output(y)


def turned(x, positions, base):
    """Rotary embedding as complex numbers: (x_i + i·x_{i+K/2})·exp(i·position·base^(−2i/K))."""
    rows, half = x.shape[2], x.shape[3] // 2
    positions = torch.arange(rows) if positions is None else positions
    angle = positions.double()[:, None] * base ** (-torch.arange(half).double() / half)
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)


CASES = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 3},
    "groups": {"groups": 2},
    "narrow keys": {"key_width": 3},
    "rotary": {"rotary_base": 100.0},
    "rotary groups": {"rotary_base": 10.0, "groups": 1, "key_width": 6},
    "first layer": {"value": True},
    "softmax only": {"shaped": False},
}


def attention(case, dtype, heads=4, width=32):
    options = dict(CASES[case])
    if options.get("value"):
        options["value"] = nn.IdentityLinear(width, dtype=dtype)
    return randomised(nn.ShapedAttention(width, heads, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_equation(case, dtype):
    module = attention(case, dtype)
    x = torch.randn(3, 11, 32, dtype=dtype)
    wide = copy.deepcopy(module).double()
    for lengths in (None, torch.tensor([11, 4, 0])):
        with torch.no_grad():
            out = module(x, lengths=lengths)
            exact = written_out(wide, x.double(), key_lengths=lengths)
            naive = written_out(module, x, key_lengths=lengths)
        real = torch.arange(11) < (torch.tensor([11] * 3) if lengths is None else lengths)[:, None]
        assert_accurate(out[real], exact[real], naive[real])


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    module = attention(case, torch.float64)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, 5, 32, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad((module(x) * seed).sum(), inputs)
    exact = torch.autograd.grad((written_out(module, x) * seed).sum(), inputs)
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 4}, {"groups": 2, "rotary_base": 1e4}])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_starts_as_the_identity(dtype, options):
    module = nn.ShapedAttention(48, 6, dtype=dtype, **options)
    x = torch.randn(2, 33, 48, dtype=dtype)
    with torch.no_grad():
        out, naive = module(x), written_out(module, x)
    if dtype == torch.float64:
        assert (out - x).abs().max() <= 1e-14
    assert_accurate(out, x.double(), naive)


def test_values_are_a_view_of_the_input(monkeypatch):
    seen = {}
    module = nn.ShapedAttention(32, 4)
    original = nn.shaped_attention.shaped_attention

    def spy(q, k, v, **options):
        seen["v"] = v
        return original(q, k, v, **options)

    monkeypatch.setattr(nn.shaped_attention, "shaped_attention", spy)
    x = torch.randn(2, 5, 32)
    module(x)
    assert seen["v"].data_ptr() == x.data_ptr() and seen["v"].stride() == (160, 8, 32, 1)


def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 3, 6, 8, dtype=torch.float64)
    t = torch.arange(6)
    near = rotate(q, t) @ rotate(k, t).mT
    far = rotate(q, t + 1000) @ rotate(k, t + 1000).mT
    torch.testing.assert_close(near, far, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(near, q @ k.mT)
    rows = torch.stack([t, t + 3])
    q = q.expand(2, -1, -1, -1)
    assert torch.equal(rotate(q, rows)[1], rotate(q[1:], t + 3)[0])


def test_packed_sequences():
    module = attention("rotary", torch.float64)
    parts = [torch.randn(1, n, 32, dtype=torch.float64) for n in (4, 1, 6)]
    bounds = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (4, 1, 6)])
    packed = module(torch.cat(parts, 1), positions=positions, cu_seqlens=bounds)
    torch.testing.assert_close(packed, torch.cat([module(x) for x in parts], 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads: expected a divisor of width = 32, got 5"),
        ({"heads": 0}, "heads"),
        ({"groups": 3}, "groups: expected a divisor of heads = 4, got 3"),
        ({"key_width": 0}, "key_width"),
        ({"key_width": 3, "rotary_base": 1e4}, "even with rotary_base; got 3"),
        ({"window": 0}, "window: expected None or at least 1, got 0"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        nn.ShapedAttention(32, **({"heads": 4} | options))


def test_bad_input():
    module = nn.ShapedAttention(32, 4, rotary_base=1e4)
    x = torch.randn(2, 5, 32)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    for arguments, options, message in (
        (x[0], {}, r"x: expected \[B, T, 32\], got \[5, 32\]"),
        (x[..., :16], {}, r"x: expected \[B, T, 32\], got \[2, 5, 16\]"),
        (x, {"lengths": torch.tensor([5, 5], dtype=torch.int32)}, "lengths: expected int64"),
        (x, {"lengths": torch.tensor([5])}, r"lengths: expected int64 \[B\] = \[2\]"),
        (x, {"lengths": torch.tensor([5, 6])}, "lengths: expected 0 to T = 5, got 6"),
        (x, {"lengths": torch.tensor([5, -1])}, "lengths: expected 0 to T = 5, got -1"),
        (x[:1], {"cu_seqlens": bounds}, "cu_seqlens: expected no cache, and positions"),
    ):
        with pytest.raises(ValueError, match=message):
            module(arguments, **options)
    with pytest.raises(ValueError, match="cache: expected None without causal"):
        nn.ShapedAttention(32, 4, causal=False)(x, cache=nn.LayerCache())
    module.alpha = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"alpha: expected \[H\] = \[4\]"):
        module(x)
