"""Coded blobs damaged in every way that notes on hostile input name, resealed so that the damage is
reached.
"""

import struct

import numpy as np
import torch

from gaugekit import codec
from gaugekit.reference.rans import crc32c

CHUNK_LOG2 = 14
TWO_CHUNKS = (1 << 14) + (1 << 13) + 1  # one more than what would still join the first chunk
INDEX = 64  # where the index of a blob of rank 1 or 2 begins
FIRST = INDEX + 2 * 32  # where the first of two chunks begins
STATES, TABLE = FIRST, FIRST + 256


def base() -> bytes:
    """bf16 [2 chunks], few exponents, mantissas not constant."""
    n = np.arange(TWO_CHUNKS, dtype=np.int64)
    bits = (120 + (n * n // 7) % 5) << 7 | (n * 37) % 128
    return codec.encode(torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16), chunk_log2=CHUNK_LOG2)


def seal(blob: bytes) -> bytes:
    """The same bytes with the checksums of index and header made right again."""
    blob = bytearray(blob)
    begin = 48 + 16 * ((8 * blob[15] + 15) // 16)
    chunks = struct.unpack_from("<I", blob, 32)[0]
    struct.pack_into("<I", blob, 36, crc32c(bytes(blob[begin : begin + 32 * chunks])))
    struct.pack_into("<I", blob, 44, crc32c(bytes(blob[:44]) + bytes(4) + bytes(blob[48:begin])))
    return bytes(blob)


def put(blob: bytes, offset: int, format: str, *values) -> bytes:
    blob = bytearray(blob)
    struct.pack_into("<" + format, blob, offset, *values)
    return bytes(blob)


def sealed(blob: bytes, offset: int, format: str, *values) -> bytes:
    return seal(put(blob, offset, format, *values))


def truncations(blob: bytes):
    edges = [*range(FIRST + 1), TABLE, TABLE + 4, TABLE + 32, len(blob) - 16, len(blob) - 1]
    for i in range(2):
        offset, length = struct.unpack_from("<QI", blob, INDEX + 32 * i)
        edges += [offset - 1, offset, offset + length - 1]
    for size in sorted(set(edges)):
        if size < len(blob):
            yield f"truncated at {size}", blob[:size]
            if size >= INDEX:
                yield (
                    f"truncated at {size}, length mended",
                    sealed(blob[:size] + bytes(64), 24, "Q", size)[:size],
                )


def headers(blob: bytes):
    fields = {
        "version 2": (8, "H", 2),
        "element id 0": (10, "B", 0),
        "element id of int8": (10, "B", 6),
        "element id 255": (10, "B", 255),
        "another kind of symbols": (11, "B", 2),
        "context model 1": (12, "B", 1),
        "0 tables a chunk": (13, "B", 0),
        "2 tables a chunk": (13, "B", 2),
        "2^13 symbols a chunk": (14, "B", 13),
        "2^21 symbols a chunk": (14, "B", 21),
        "2^15 symbols a chunk": (14, "B", 15),
        "count one less": (16, "Q", TWO_CHUNKS - 1),
        "2^60 elements": (16, "Q", 1 << 60),
        "length one more": (24, "Q", len(blob) + 1),
        "no chunks": (32, "I", 0),
        "three chunks": (32, "I", 3),
        "reserved field": (40, "I", 1),
        "dimension one more": (48, "Q", TWO_CHUNKS + 1),
        "dimension of 64 bits": (48, "Q", (1 << 63) + TWO_CHUNKS),
    }
    for name, (offset, format, value) in fields.items():
        yield name, sealed(blob, offset, format, value)
    yield "magic", put(blob, 0, "B", blob[0] ^ 1)
    yield "rank 65", put(blob, 15, "B", 65)
    yield "2^60 elements, shape too", seal(put(put(blob, 16, "Q", 1 << 60), 48, "Q", 1 << 60))
    huge = (1 << 59) + 1
    yield "2^59 + 1 elements, shape too", seal(put(put(blob, 16, "Q", huge), 48, "Q", huge))
    yield (
        "product overflows to the count",
        seal(put(blob, 15, "B", 2)[:48] + struct.pack("<QQ", 1 << 62, 8) + blob[64:]),
    )
    wrapped = struct.pack("<QQ", TWO_CHUNKS, (1 << 62) + 1)
    yield "product overflows", seal(put(blob, 15, "B", 2)[:48] + wrapped + blob[64:])
    yield "trailing bytes", blob + bytes(16)
    yield "trailing bytes, length mended", sealed(blob + bytes(16), 24, "Q", len(blob) + 16)


def indices(blob: bytes):
    offset, length, symbols, _, _, first, second = struct.unpack_from("<QIHBBII", blob, INDEX)
    fields = {
        "first chunk later": (0, "Q", offset + 16),
        "first chunk in the index": (0, "Q", INDEX),
        "second chunk at the first": (32, "Q", offset),
        "second chunk past the end": (32, "Q", len(blob) + 16),
        "second chunk at 2^64 - 16": (32, "Q", (1 << 64) - 16),
        "length of a chunk 0": (8, "I", 0),
        "length of a chunk one more": (8, "I", length + 1),
        "length of a chunk 16 more": (8, "I", length + 16),
        "length of a chunk 2^32 - 1": (8, "I", (1 << 32) - 1),
        "no symbols": (12, "H", 0),
        "33 symbols": (12, "H", 33),
        "256 symbols": (12, "H", 256),
        "257 symbols": (12, "H", 257),
        "one symbol less": (12, "H", symbols - 1),
        "method raw": (14, "B", 0),
        "method 2": (14, "B", 2),
        "plane 0 constant": (15, "B", 1),
        "a plane that is not there": (15, "B", 2),
        "one word less": (16, "I", first - 1),
        "one word more": (20, "I", second + 1),
        "more words than symbols": (16, "I", 1 << 13 | 1),
        "2^32 - 1 words": (20, "I", (1 << 32) - 1),
        "checksum of decoded bytes": (28, "I", 0),
    }
    for name, (place, format, value) in fields.items():
        yield name, sealed(blob, INDEX + place, format, value)


def tables_and_states(blob: bytes):
    pairs = struct.unpack_from("<10H", blob, TABLE)
    fields = {
        "frequency 0": (TABLE + 2, "H", 0),
        "frequency 4097": (TABLE + 2, "H", 4097),
        "frequency 65535": (TABLE + 2, "H", 65535),
        "sum 4097": (TABLE + 2, "H", pairs[1] + 1),
        "sum 4095": (TABLE + 2, "H", pairs[1] - 1),
        "duplicate symbol": (TABLE + 4, "H", pairs[0]),
        "descending symbols": (TABLE, "H", pairs[2] + 1),
        "symbol 256": (TABLE + 16, "H", 256),
        "another symbol": (TABLE, "H", pairs[0] - 1),
        "moved frequency": (TABLE, "4H", pairs[0], pairs[1] - 1, pairs[2], pairs[3] + 1),
        "state 2^15 - 1": (STATES, "I", (1 << 15) - 1),
        "state 0": (STATES + 252, "I", 0),
        "state 2^31": (STATES + 4, "I", 1 << 31),
        "another state": (STATES + 8, "I", struct.unpack_from("<I", blob, STATES + 8)[0] ^ 1),
    }
    for name, (offset, format, *values) in fields.items():
        yield name, put(blob, offset, format, *values)


def ten_bit_symbols() -> bytes:
    """bf16, one chunk of exponents 0, 60 and 122 in ten-bit symbols."""
    n = np.arange(9999, dtype=np.int64)
    bits = np.array([0, 60, 122])[n * n % 89 % 3] << 7 | n % 7
    return codec.encode(
        torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16), symbols="exponent-and-mantissa"
    )


def models(_: bytes):
    blob, table = ten_bit_symbols(), 96 + 256
    symbols, *_, constant = struct.unpack_from("<HBB", blob, INDEX + 12)
    assert (symbols, blob[INDEX + 14], constant) == (3, 1, 0)
    yield "symbol 1024", put(blob, table + 8, "H", 1024)
    yield "exponents 63 apart", put(blob, table + 8, "H", 4 * 123)
    yield "ten-bit symbols descending", put(blob, table + 4, "H", 4 * 122 + 1)
    yield "another ten-bit symbol", put(blob, table + 8, "H", 4 * 122 + 1)
    yield "exponents said to be ten-bit symbols", sealed(base(), 11, "B", 2)
    yield "ten-bit symbols said to be exponents", sealed(blob, 11, "B", 0)
    yield "a chunk of ten-bit symbols said to be of exponents", sealed(blob, INDEX + 14, "B", 2)
    tensor = torch.full((1000,), 1.5, dtype=torch.bfloat16)
    constant = codec.encode(tensor, symbols="exponent-and-mantissa")
    assert constant[INDEX + 15] == 1
    yield "a constant of seven bits", put(constant, len(constant) - 16, "B", 64)
    byte = codec.encode(torch.zeros(500, dtype=torch.int8))
    yield "a plane of a type without planes", sealed(byte, INDEX + 15, "B", 1)


def every() -> dict[str, bytes]:
    """Name of the damage -> a blob that must be refused."""
    blob = base()
    kinds = (truncations, headers, indices, tables_and_states, models)
    return {name: damaged for kind in kinds for name, damaged in kind(blob)}
