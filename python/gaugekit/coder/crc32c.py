"""CRC-32C (RFC 3720) in NumPy: the register is linear over GF(2), so equal blocks run side by side and are
joined.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.cache
def _crc_tables() -> tuple[np.ndarray, np.ndarray]:
    one_byte = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        one_byte = np.where(one_byte & 1, (one_byte >> 1) ^ np.uint32(0x82F63B78), one_byte >> 1)
    both = np.arange(65536, dtype=np.uint32)
    both = (both >> 8) ^ one_byte[both & 255]
    return one_byte, (both >> 8) ^ one_byte[both & 255]


@functools.cache
def _crc_zeros(log2: int) -> np.ndarray:
    """What 2^log2 zero bytes do to each bit of the register: 32 columns."""
    if log2 == 0:
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        return (bits >> 8) ^ _crc_tables()[0][bits & 255]
    half = _crc_zeros(log2 - 1)
    return _crc_apply(half, half)


def _crc_apply(columns: np.ndarray, registers: np.ndarray) -> np.ndarray:
    result = np.zeros_like(registers)
    for bit in range(32):
        result ^= np.where(registers >> np.uint32(bit) & np.uint32(1), columns[bit], np.uint32(0))
    return result


def crc32c(data: np.ndarray, crc: int = 0) -> int:
    """CRC-32C of a uint8 vector, ``crc`` being the checksum of what came before it."""
    one_byte, two = _crc_tables()
    register = crc ^ 0xFFFFFFFF
    block_log2 = 8 if data.size < 1 << 20 else 12
    blocks = data.size >> block_log2
    if blocks > 1:
        pairs = np.ascontiguousarray(data[: blocks << block_log2].reshape(blocks, -1).view("<u2").T)
        registers = np.zeros(blocks, np.uint32)
        registers[0] = register
        for column in pairs:
            registers = (registers >> 16) ^ two[(registers ^ column) & 0xFFFF]
        log2 = block_log2
        while registers.size > 1:
            if registers.size % 2:  # a leading register of zero changes nothing
                registers = np.concatenate([np.zeros(1, np.uint32), registers])
            registers = _crc_apply(_crc_zeros(log2), registers[::2]) ^ registers[1::2]
            log2 += 1
        register, data = int(registers[0]), data[blocks << block_log2 :]
    for byte in data.tolist():
        register = (register >> 8) ^ int(one_byte[(register ^ byte) & 255])
    return register ^ 0xFFFFFFFF


@functools.cache
def _crc_columns(log2: int) -> list[int]:
    return _crc_zeros(log2).tolist()


def joined(first: int, second: int, size: int) -> int:
    """The CRC-32C of two pieces, the second of ``size`` bytes, from the CRC-32C of each."""
    register = first
    for log2 in range(size.bit_length()):
        if size >> log2 & 1:  # in integers: arrays of one number would take a hundred times as long
            before, register = register, 0
            for bit, column in enumerate(_crc_columns(log2)):
                if before >> bit & 1:
                    register ^= column
    return register ^ second
