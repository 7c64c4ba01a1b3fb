"""Law 6: what must hold whatever the numbers are."""

import hashlib
import itertools

import pytest
import torch

import gaugekit as gk
from helpers import assert_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensors(dtype, heads=4, groups=2, length=33, width=16):
    return (
        torch.randn(2, heads, length, width, dtype=dtype),
        torch.randn(2, groups, length, width, dtype=dtype),
        torch.randn(2, groups, length, width, dtype=dtype),
    )


def spread(v, heads):
    return v.repeat_interleave(heads // v.shape[1], dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_alpha_alone_is_the_value(dtype, causal):
    q, k, v = tensors(dtype)
    out = gk.shaped_attention(
        q, k, v, alpha=torch.ones(4), beta=torch.zeros(4), gamma=torch.zeros(4), causal=causal
    )
    assert torch.equal(out, spread(v, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_zero_queries_with_unit_gains_are_the_identity(dtype, causal):
    """At initialisation (W_Q = 0, α = β = γ = 1) a simplified block passes its input through: A = C."""
    q, k, v = tensors(dtype)
    q.zero_()
    ones = torch.ones(4)
    out = gk.shaped_attention(q, k, v, alpha=ones, beta=ones, gamma=ones, causal=causal)
    core = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    ref = spread(v, 4).double()
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=causal, enable_gqa=True
    )
    naive = (ref + core.double() - exact).to(dtype)
    assert_accurate(out, ref, naive)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_beta_alone_is_softmax_attention(dtype, causal):
    q, k, v = tensors(dtype)
    plain = torch.nn.functional.scaled_dot_product_attention
    ref = plain(q.double(), k.double(), v.double(), is_causal=causal, enable_gqa=True)
    naive = plain(q, k, v, is_causal=causal, enable_gqa=True)
    assert_accurate(gk.shaped_attention(q, k, v, causal=causal), ref, naive)
    assert_accurate(gk.shaped_attention(q, k, v, beta=torch.ones(4), causal=causal), ref, naive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_prefill_and_cached_decode_are_the_full_forward(dtype):
    """Queries in pieces against the keys so far give the rows of the whole."""
    q, k, v = tensors(dtype)
    gains = {name: torch.randn(4) for name in ("alpha", "beta", "gamma")}
    whole = gk.shaped_attention(q, k, v, causal=True, **gains)
    ref = gk.shaped_attention(q.double(), k.double(), v.double(), causal=True, **gains)
    for edges in ([0, 10, 11, 33], list(range(34))):
        pieces = [
            gk.shaped_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal=True, **gains)
            for a, b in itertools.pairwise(edges)
        ]
        assert_accurate(torch.cat(pieces, dim=2), ref, whole)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pieces_at_places_of_their_own_are_the_full_forward(dtype, window):
    """Sequences of 33 and 20 rows, each cut at its own places (query_start), grouped heads, every term."""
    q, k, v = tensors(dtype)
    mask = {"causal": True, "window": window, "key_lengths": torch.tensor([33, 20])}
    gains = {name: torch.randn(4) for name in ("alpha", "beta", "gamma", "lam")}
    v0 = torch.randn_like(v)
    start = torch.zeros(2, dtype=torch.int64)
    whole = gk.shaped_attention(q, k, v, v0=v0, query_start=start, **mask, **gains)
    double = (x.double() for x in (q, k, v))
    ref = gk.shaped_attention(*double, v0=v0.double(), query_start=start, **mask, **gains)
    found = torch.empty_like(whole)
    for places, rows in (([0, 0], 9), ([9, 4], 16), ([25, 20], 8), ([32, 13], 1), ([0, 14], 6)):
        cut = [slice(place, place + rows) for place in places]
        part = [torch.stack([x[b, :, cut[b]] for b in range(2)]) for x in (q, v0)]
        out = gk.shaped_attention(
            part[0], k, v, v0=part[1], query_start=torch.tensor(places), **mask, **gains
        )
        for b in range(2):
            found[b, :, cut[b]] = out[b]
    for b, length in enumerate((33, 20)):
        assert_accurate(found[b, :, :length], ref[b, :, :length], whole[b, :, :length])


def test_pack_then_unpack_restores_the_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    plain, packed, back = (
        tmp_path / name for name in ("plain.safetensors", "packed.safetensors", "back.safetensors")
    )
    safetensors.save_file(
        {
            "bf16": torch.randn(300, 70).bfloat16(),
            "fp32": torch.randn(1000),
            "fp16": torch.randn(40, 40).half(),
            "ids": torch.arange(10),
            "empty": torch.empty(0, 4),
        },
        plain,
        metadata={"format": "pt"},
    )
    gk.codec.pack(plain, packed)
    gk.codec.unpack(packed, back)
    digest = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (plain, back)]
    assert digest[0] == digest[1]
    assert packed.stat().st_size < plain.stat().st_size
