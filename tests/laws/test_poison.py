"""Law 5: what is allocated and not written is NaN, in Python and in C++."""

import torch

import gaugekit as gk


def test_uninitialised_memory_is_poisoned():
    assert torch.isnan(torch.empty(1000)).all()
    assert (torch.empty(1000, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_every_element_of_an_output_is_written():
    """Rows that see no key, padding rows and queries beyond the keys are written too: as zero."""
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 5)
    gains = [torch.randn(4) for _ in range(4)]
    out = gk.shaped_attention(
        q,
        k,
        v,
        alpha=gains[0],
        beta=gains[1],
        gamma=gains[2],
        v0=torch.randn_like(v),
        lam=gains[3],
        causal=True,
        window=2,
        key_lengths=torch.tensor([0, 3]),
    )
    assert torch.isfinite(out).all()
    assert not out[0].any() and not out[1, :, 3:].any()
