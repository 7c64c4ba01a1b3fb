"""Models as slicing leaves them: groups that share a rotation, shortcuts between them, and the rest."""

import torch

from gaugekit.codec.bitsback import Coupling, Group, Part


def weight(rows: int, dimension: int, generator: torch.Generator, spectrum: float = 0.0) -> torch.Tensor:
    """Normal, rows of different lengths, singular values that fall like i^−spectrum."""
    falling = torch.arange(1, dimension + 1).float() ** -spectrum
    x = torch.randn(rows, dimension, generator=generator) * falling
    turn, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator))
    return 0.02 * torch.exp(0.3 * torch.randn(rows, 1, generator=generator)) * (x @ turn)


def model(dimensions: list[int], dtype: torch.dtype, seed: int = 0, multiple: int = 6, spectrum: float = 0.0):
    """(groups, others, couplings): ``multiple`` · D rows a group, in both orientations, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    groups, couplings = [], []
    for index, dimension in enumerate(dimensions):
        half = max(1, multiple * dimension // 2)
        parts = [
            Part(f"{index}.in", weight(half, dimension, generator, spectrum), dtype),
            Part(f"{index}.out", weight(half, dimension, generator, spectrum).double(), dtype, axis=0),
        ]
        bias_dtype = torch.float16 if dtype == torch.int8 else dtype
        parts.append(Part(f"{index}.bias", weight(1, dimension, generator)[0], bias_dtype))
        groups.append(Group(dimension, parts))
        if index:
            shortcut = torch.randn(dimensions[index - 1], dimension, generator=generator) / dimension**0.5
            couplings.append(Coupling(f"{index}.shortcut", index - 1, index, shortcut, dtype))
    largest = max(dimensions, default=1)
    others = {
        "embedding": torch.randn(20 * largest, largest, generator=generator).to(torch.bfloat16),
        "gain": torch.randn(largest, generator=generator),
        "ids": torch.arange(7),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "nothing": torch.zeros(0, 4),
    }
    return groups, others, couplings


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits_of(a[n]), bits_of(b[n]))
        for n in a
    )
