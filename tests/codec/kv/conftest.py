import pytest
import torch


@pytest.fixture
def blocks():
    """Four blocks [P, L, S, D] of a cache whose channels keep their size from token to token."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(2 * torch.randn(2, 3, 1, 32, generator=generator))
    return [(torch.randn(2, 3, 64, 32, generator=generator) * sizes).bfloat16() for _ in range(4)]
