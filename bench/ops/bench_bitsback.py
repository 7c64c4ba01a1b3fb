"""Bits-back of one group beside the published scheme (examples/bits_back_eigen.py) on the same layer.

The published scheme has no entropy coder: it pops and pushes plain float16 numbers, and what it gives back is not what
it took. Ours codes the group's weights as well, and gives back every bit; the rows say how many bits each nets.
"""

import importlib.util
from pathlib import Path

import torch

from gaugekit.codec.bitsback import Group, Part, decode, encode
from registry import Case, benchmark, own_shape

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "bits_back_eigen.py"


def published():
    """The module of the example; None where there is no checkout that has it."""
    if not EXAMPLE.is_file():
        return None
    spec = importlib.util.spec_from_file_location("bits_back_eigen", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer(dimension: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, D] and the message that its rotation shall carry in the published scheme."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
    weight = 0.02 * lengths * torch.randn(rows, dimension, generator=generator)
    return weight, (0.02 * torch.randn(dimension * (dimension + 1) // 2, generator=generator)).half()


@own_shape("bitsback", "DIMENSION", "768", torch.float16, torch.bfloat16, torch.int8)
def own(dimension: int, dtype: torch.dtype, threads: int):
    if dimension < 16:  # too little for the bits that ``check`` expects
        raise ValueError(f"--shape: expected a DIMENSION of 16 or more, got {dimension}")
    yield from group(published(), dimension, dtype, "cpu", threads)


@benchmark("bitsback")
def cases(device: str, quick: bool):
    eigen = published()
    for dimension in (96,) if quick else (256, 512, 1024):
        for dtype in (torch.float16, torch.bfloat16, torch.int8):
            if dtype != torch.float16 and dimension != (96 if quick else 512):
                continue
            yield from group(eigen, dimension, dtype, device)


def group(eigen, dimension: int, dtype: torch.dtype, device: str, threads: int | None = None):
    """Encoding and decoding of 6 D rows, whose rotation is taken from D rows more."""
    weight, message = layer(dimension, 6 * dimension)
    groups, others = [Group(dimension, [Part("w", weight, dtype)])], {"message": message.repeat(2)}
    payload, report = encode(groups, others)
    (result,) = report.groups
    extra = {
        "degrees_of_freedom": result.degrees_of_freedom,
        "net_bits": result.realised_bits / result.degrees_of_freedom,
        "corrections_bits": result.corrections_bits / result.degrees_of_freedom,
        "share_of_nominal": result.share,
    }
    rivals = {"encode": None, "decode": None}
    if eigen is not None:
        coded = eigen.encode(weight, message)
        back = eigen.decode(coded)
        exact = (back.view(torch.int16) == message.view(torch.int16)).double().mean().item()
        extra["published_numbers_returned_exactly"] = exact
        rivals = {"encode": lambda: eigen.encode(weight, message), "decode": lambda: eigen.decode(coded)}

    def check():
        tensors = decode(payload)
        assert torch.equal(tensors["message"], others["message"])
        assert result.realised_bits > {torch.float16: 11.3, torch.bfloat16: 8.4, torch.int8: 5.5}[dtype] * (
            result.degrees_of_freedom
        )

    name = "eigenvectors, float16, inexact"
    for what, ours in (("encode", lambda: encode(groups, others)), ("decode", lambda: decode(payload))):
        yield Case(
            op="bitsback",
            shape=f"{what} a group, D {dimension}, {6 * dimension} rows",
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            ours=ours,
            rivals={name: rivals[what]},
            without_us=name,
            check=check,
            threads=threads,
            rounds=7,
            seconds=1.0,
            label="weights coded too; the published scheme's are not",
            extra=extra,
        )
