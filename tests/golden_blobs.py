"""Golden blobs, and what they hold.

A golden file holds the CRC-32C of the blob, then the blob in hexadecimal. What it codes is made by integers
alone: element i of a vector is drawn from a list of patterns by bits of the linear congruential generator
state <- state * 1103515245 + 12345 (mod 2^31), starting from 1, bits 16 and up of each new state.
"""

from pathlib import Path

import numpy as np
import torch

from gaugekit.reference import rans as oracle

GOLDEN = Path(__file__).parent / "codec" / "golden"


def draw(count: int) -> np.ndarray:
    state, result = 1, np.empty(count, np.int64)
    for i in range(count):
        state = (state * 1103515245 + 12345) % (1 << 31)
        result[i] = state >> 16
    return result


def skewed(count: int) -> np.ndarray:
    """0 half of the time, 1 a quarter, ... 14."""
    return np.array([(int(x) | 1 << 14).bit_length() - int(x).bit_length() for x in draw(count)])


def vectors() -> dict[str, tuple[torch.Tensor, str, int]]:
    """Name -> (tensor, symbols, log2 of the symbols a chunk)."""
    n = np.arange(1000)
    bf16 = (125 - skewed(1000)) << 7 | draw(1000) % 128 | (draw(1000) // 128 % 2) << 15
    fp16 = (0x2C - skewed(801)) << 8 | draw(801) % 256
    fp32 = (125 - skewed(600)) << 23 | draw(600) << 8 | n[:600] % 256
    many = (np.where(n % 3, 127, n % 256) << 7) | 0x55
    chunks = (127 - (skewed(24577) > 9)) << 7
    byte = (skewed(2100) * 37 + 17) % 256
    as_byte = lambda dtype: torch.from_numpy(byte.astype(np.uint8)).view(dtype)  # noqa: E731
    as_bf16 = lambda x: torch.from_numpy(x.astype(np.uint16).view(np.int16)).view(torch.bfloat16)  # noqa: E731
    return {
        "bf16": (as_bf16(bf16).view(20, 50), "exponent", 17),
        "fp16": (torch.from_numpy(fp16.astype(np.int16)).view(torch.float16), "high-byte", 14),
        "fp32": (torch.from_numpy(fp32.astype(np.int32)).view(torch.float32), "exponent", 20),
        "bf16_205_symbols": (as_bf16(many), "exponent", 17),
        "bf16_two_chunks": (as_bf16(chunks), "exponent", 14),
        "bf16_raw": (as_bf16(draw(64) * 2), "high-byte", 17),
        "fp32_constant": (torch.full((70, 3), 1.0), "exponent", 17),
        "bf16_ten_bits": (as_bf16(bf16), "exponent-and-mantissa", 17),
        "bf16_ten_bits_zeros": (
            as_bf16(np.where(n % 5 == 2, n % 2 << 15, bf16)),
            "exponent-and-mantissa",
            14,
        ),
        "bf16_ten_bits_far_exponents": (
            as_bf16(np.where(n % 50 == 2, 0x7F80, bf16)),
            "exponent-and-mantissa",
            17,
        ),
        "bf16_ten_bits_constant": (as_bf16(np.full(999, 0xBFE5)), "exponent-and-mantissa", 17),
        "float8_e4m3": (as_byte(torch.float8_e4m3fn), "high-byte", 17),
        "float8_e5m2": (as_byte(torch.float8_e5m2).view(7, 300), "high-byte", 14),
        "int8": (as_byte(torch.int8), "high-byte", 20),
        "int8_raw": (as_byte(torch.int8)[:64], "high-byte", 17),
        "empty": (torch.empty(0, 7, dtype=torch.float16), "high-byte", 17),
    }


VECTORS = vectors()


def golden(name: str) -> bytes:
    crc, *lines = (GOLDEN / f"{name}.hex").read_text().split()
    blob = bytes.fromhex("".join(lines))
    assert oracle.crc32c(blob) == int(crc, 16)
    return blob
