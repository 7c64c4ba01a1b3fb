"""Blocks of a key/value cache, compared bit for bit."""

import torch

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_bits(shape, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every pattern, those of NaN too."""
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return data.view(dtype).view(shape)
