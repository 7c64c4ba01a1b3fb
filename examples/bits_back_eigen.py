"""Free bits from a rotation twice: as published, by eigenvectors of float16 numbers, and by integers, exactly.

    python examples/bits_back_eigen.py [--quick] [--dimension 512]

A group of matrices W [rows, D] that share a rotation of the residual stream may be stored as W Qᵀ with any Q in O(D).
Which Q can carry D(D − 1)/2 numbers of what was stored before. He, Flamich and Hernández-Lobato (arXiv:2410.01309) take
D(D + 1)/2 stored float16 weights, make a symmetric matrix of them, and use its eigenvectors as Q and its D eigenvalues
as the rest. The decoder finds Q by another eigendecomposition, and the weights come back nearly.
"""

import argparse
import time
from dataclasses import dataclass

import torch

from gaugekit.codec import bitsback


@dataclass
class Published:
    """A layer as the paper's code leaves it: W' = W Qᵀ in float16, the signs of Q's columns, and D eigenvalues."""

    stored: torch.Tensor
    signs: torch.Tensor
    eigenvalues: torch.Tensor


def eigenvectors(rows: torch.Tensor) -> torch.Tensor:
    """Of WᵀW, W [n, D]: the rotation in which W is canonical."""
    wide = rows.double()
    return torch.linalg.eigh(wide.T @ wide)[1]


def encode(weight: torch.Tensor, message: torch.Tensor) -> Published:
    """Takes D(D + 1)/2 float16 numbers, all of ``message``, out of the stack, and hides them in W's rotation."""
    dimension = weight.shape[1]
    symmetric = torch.zeros(dimension, dimension, dtype=torch.float64)
    upper = torch.triu_indices(dimension, dimension)
    symmetric[upper[0], upper[1]] = message.double()
    symmetric = symmetric + symmetric.triu(1).T
    eigenvalues, q = torch.linalg.eigh(symmetric)
    canonical = weight.double() @ eigenvectors(weight)
    stored = (canonical @ q.T).half()
    signs = (eigenvectors(stored) * q).sum(0).sign()
    return Published(stored, signs, eigenvalues.half())


def decode(layer: Published) -> torch.Tensor:
    """The message, nearly."""
    q = eigenvectors(layer.stored) * layer.signs
    symmetric = (q * layer.eigenvalues.double()) @ q.T
    upper = torch.triu_indices(*symmetric.shape)
    return symmetric[upper[0], upper[1]].half()


def timed(call):
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="D = 96")
    parser.add_argument("--dimension", type=int, default=512, help="D (512)")
    arguments = parser.parse_args()
    dimension = 96 if arguments.quick else arguments.dimension

    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(6 * dimension, dimension, generator=generator)
    numbers = dimension * (dimension + 1) // 2
    message = (0.02 * torch.randn(numbers, generator=generator)).half()
    dof = dimension * (dimension - 1) // 2

    layer, encoding = timed(lambda: encode(weight, message))
    returned, decoding = timed(lambda: decode(layer))
    exact = returned.view(torch.int16) == message.view(torch.int16)
    error = (returned.double() - message.double()).abs().max() / message.double().std()
    print(f"{dof:,} angles of O({dimension}), 6 D rows in float16")
    print(
        f"as published: takes 16 bits an angle; {exact.double().mean():.1%} of the numbers come back, "
        f"the worst is off by {error:.2g} standard deviations; encoding {encoding:.2f} s, decoding {decoding:.2f} s"
    )

    group = bitsback.Group(dimension, [bitsback.Part("w", weight, torch.float16)])
    (payload, report), encoding = timed(lambda: bitsback.encode([group], {"message": message.repeat(2)}))
    tensors, decoding = timed(lambda: bitsback.decode(payload))
    intact = torch.equal(tensors["message"].view(torch.int16), message.repeat(2).view(torch.int16))
    (result,) = report.groups
    print(
        f"by integers: takes {result.popped_bits / dof:.1f} bits an angle, gives back "
        f"{result.corrections_bits / dof:.1f} as corrections, nets {result.realised_bits / dof:.2f}; the message is "
        f"{'identical' if intact else 'damaged'}; encoding {encoding:.2f} s, decoding {decoding:.2f} s"
    )


if __name__ == "__main__":
    main()
