"""Tensors as they are stored: rounded or quantised, coded on the stack, and read again as rows with known rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from gaugekit.codec.bitsback.model import scale_name
from gaugekit.ops.bitsback.operator import KINDS, Stack, frequencies_of
from gaugekit.ops.rans.operator import CorruptFile, crc32c

MANTISSA = {torch.float16: (10, 15), torch.bfloat16: (7, 127)}  # its bits, and the exponent's bias
# dtypes that a payload may name
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        ),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}


def store(name: str, weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """[the stored tensor], of int8 [integers, scales float32 [rows]]: each row's largest magnitude becomes 127."""
    if dtype != torch.int8:
        stored = weight.to(dtype).contiguous()
        if stored.numel() and not torch.isfinite(torch.stack(weight.aminmax()).to(dtype)).all():
            raise ValueError(f"{name}: a weight of {weight.abs().max():.3g} is beyond {dtype}")
        return [stored]
    scale = weight.abs().amax(1).float() / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return [(weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous(), scale]


def rows_of(stored: list[torch.Tensor], axis: int, rows: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """(these rows, float64 [n, D]; the variance of their rounding, float64 [n]) of a stored part."""
    tensor = stored[0].view(1, -1) if stored[0].dim() == 1 else stored[0]
    picked = tensor[rows] if axis == 1 or stored[0].dim() == 1 else tensor[:, rows].T
    if tensor.dtype != torch.int8:
        return picked.double(), _float_variance(picked)
    scale = stored[1].double()
    if axis == 1:
        scale = scale[rows]
        return picked.double() * scale[:, None], (scale * scale / 12).numpy()
    mean = math.fsum((scale * scale).tolist()) / max(1, scale.numel())
    return picked.double() * scale, np.full(rows.numel(), mean / 12)


def listed(tensors: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """The tensors in the dtypes under which a file lists them: int8 ones whose scales it does not list are multiplied
    by them in float32 and rounded once.
    """
    given, used = {}, set()
    for name, tensor in tensors.items():
        scale, dtype = scale_name(name), dtypes.get(name)
        if tensor.dtype == torch.int8 and dtype in MANTISSA and scale in tensors and scale not in dtypes:
            used.add(scale)
            tensor = (tensor.float() * tensors[scale][:, None]).to(dtype)
        given[name] = tensor
    return {name: tensor for name, tensor in given.items() if name not in used}


def _float_variance(rows: torch.Tensor) -> np.ndarray:
    """A twelfth of the mean squared step between neighbours of the elements: integers and powers of two, summed in one
    order, so that a decoder finds the same bits.
    """
    mantissa, bias = MANTISSA[rows.dtype]
    n, width = rows.shape
    bits = rows.contiguous().view(torch.int16).numpy().view(np.uint16)
    exponents = bits >> mantissa & (31 if rows.dtype == torch.float16 else 255)
    kinds = 32 if rows.dtype == torch.float16 else 256
    key = exponents.astype(np.int64) + np.arange(n)[:, None] * kinds
    counts = np.bincount(key.ravel(), minlength=n * kinds).reshape(n, kinds)
    total = np.zeros(n)
    for exponent in range(kinds):
        total = total + counts[:, exponent] * 4.0 ** (max(exponent, 1) - bias - mantissa)
    return total / (12 * max(1, width))


def push(stack: Stack, name: str, tensor: torch.Tensor) -> dict:
    """Pushes a tensor; returns what a decoder must know of it."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"{name}: expected a dtype among {', '.join(DTYPES)}, got {dtype}")
    weights = _symbols(tensor)
    frequencies = frequencies_of(weights)
    stack.push_weights(weights, frequencies)
    table = [[s, f] for s, f in enumerate(frequencies.tolist()) if f]
    return {
        "name": name,
        "dtype": dtype,
        "shape": list(tensor.shape),
        "table": table,
        "crc": checksum(tensor),
    }


def pop(stack: Stack, entry: dict) -> torch.Tensor:
    """The tensor of an entry that ``payload.parse`` has checked; CorruptFile."""
    tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    frequencies = torch.zeros(32 if tensor.dtype == torch.float16 else 256, dtype=torch.int32)
    for symbol, frequency in entry["table"]:
        frequencies[symbol] = frequency
    stack.pop_weights(_symbols(tensor), frequencies)
    if checksum(tensor) != entry["crc"]:
        raise CorruptFile(f"not a sound payload: the checksum of {entry['name']} is wrong")
    return tensor


def _symbols(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that the stack codes."""
    flat = tensor.detach().contiguous().view(-1)
    return flat if tensor.dtype in KINDS else flat.view(torch.uint8)


def checksum(tensor: torch.Tensor) -> int:
    return crc32c(tensor.detach().contiguous().view(-1).view(torch.uint8))


def bytes_of(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize
