"""The payload's bytes: a header that says what lies on the stack, the stack, and a checksum over both.

    magic 8 bytes | version, header's bytes: uint32 | words: uint64 | states: 32 uint32 | header: JSON, UTF-8
    | the stack's words: uint16 each, the last one on top | CRC-32C of all before it: uint32

All integers are little-endian. docs/format.md gives the meaning of the words.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import torch

from gaugekit.codec.bitsback.weights import DTYPES, bytes_of
from gaugekit.ops.bitsback.operator import Stack
from gaugekit.ops.rans.operator import CorruptFile, crc32c
from gaugekit.reference.bitsback import CODERS, SLOTS

MAGIC = b"GKBITS\x1a\n"
VERSION = 1
HEAD = struct.Struct("<8sIIQ")
STATES = 4 * CODERS
MOST_ROWS = 1 << 32
MOST_DIMENSION = 1 << 16
EXPANSION = 128  # decoded bytes that a byte of the payload may stand for


def build(header: dict, stack: Stack) -> torch.Tensor:
    """uint8 [bytes]."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    states = stack.states.numpy().astype("<u4").tobytes()
    words = stack.words[: stack.size].numpy().astype("<i2", copy=False)
    front = HEAD.pack(MAGIC, VERSION, len(text), stack.size) + states + text
    payload = np.empty(len(front) + 2 * stack.size + 4, np.uint8)
    payload[: len(front)] = np.frombuffer(front, np.uint8)
    payload[len(front) : -4] = words.view(np.uint8)
    tensor = torch.from_numpy(payload)
    payload[-4:] = np.frombuffer(struct.pack("<I", crc32c(tensor[:-4])), np.uint8)
    return tensor


def damaged(sentence: str) -> CorruptFile:
    return CorruptFile(f"not a sound payload: {sentence}")


def parse(payload: torch.Tensor, path: int = -1) -> tuple[dict, Stack]:
    """(header, stack), checked for all that can be checked without decoding; CorruptFile."""
    size, front = payload.numel(), HEAD.size + STATES
    if size < front + 4:
        raise damaged(f"{size} bytes are fewer than its head has")
    data = payload.numpy()
    magic, version, length, words = HEAD.unpack(data[: HEAD.size].tobytes())
    if magic != MAGIC:
        raise damaged("it does not begin as one")
    if version != VERSION:
        raise damaged(f"version {version} is not one that this gaugekit reads")
    if size != front + length + 2 * words + 4:
        raise damaged("its length is not what its head says")
    if crc32c(payload[:-4]) != struct.unpack("<I", data[-4:].tobytes())[0]:
        raise damaged("its checksum is wrong")
    states = np.frombuffer(data[HEAD.size : front].tobytes(), "<u4").astype(np.int64)
    if (states >> 16 == 0).any():
        raise damaged("a state is not in [2^16, 2^32)")
    try:
        header = json.loads(data[front : front + length].tobytes().decode())
        _check_header(header, size)
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        if isinstance(error, CorruptFile):
            raise
        raise damaged("its header is not in order") from None
    pile = np.empty(words, "<i2")
    pile.view(np.uint8)[:] = data[front + length : -4]
    return header, Stack(torch.from_numpy(pile.astype(np.int16, copy=False)), torch.from_numpy(states), path)


def _check_header(header: Any, size: int) -> None:
    names: list[str] = []
    total = 0

    def tensor(entry, ranks) -> list[int]:
        nonlocal total
        shape, table = entry["shape"], entry["table"]
        integers = [*shape, *(x for pair in table for x in pair), entry["crc"]]
        if not all(type(x) is int and 0 <= x < MOST_ROWS for x in integers) or type(entry["name"]) is not str:
            raise ValueError
        if entry["dtype"] not in DTYPES or len(shape) not in ranks:
            raise ValueError
        alphabet = 32 if entry["dtype"] == "float16" else 256
        if any(len(pair) != 2 or pair[0] >= alphabet for pair in table) or sum(f for _, f in table) != SLOTS:
            raise ValueError
        names.append(entry["name"])
        total += bytes_of(shape, entry["dtype"])
        return shape

    def stored(entries, ranks) -> list[int]:
        shape = tensor(entries[0], ranks)
        if entries[0]["dtype"] == "int8":
            if tensor(entries[1], (1,)) != shape[:1] or entries[1]["dtype"] != "float32" or len(entries) != 2:
                raise ValueError
        elif entries[0]["dtype"] not in ("float16", "bfloat16") or len(entries) != 1:
            raise ValueError
        return shape

    for entry in header["others"]:
        tensor(entry, range(65))
    for group in header["groups"]:
        dimension, count, bits = group["dimension"], group["pivots"], group["bits"]
        if not all(type(x) is int for x in (dimension, count, bits)) or not 2 <= bits <= 16:
            raise ValueError
        if (
            not 0 <= count <= dimension < MOST_DIMENSION
            or dimension < 1
            or group["choice"] not in ("even", "listed")
        ):
            raise ValueError
        rows = 0
        for part in group["parts"]:
            shape = stored(part["tensors"], (1, 2))
            if part["axis"] not in (0, 1) or shape[part["axis"] if len(shape) == 2 else 0] != dimension:
                raise ValueError
            rows += shape[1 - part["axis"]] if len(shape) == 2 else 1
        for coupling in group["couplings"]:
            stored(coupling, (2,))
        if count > rows:
            raise ValueError
    if type(header["seeds"]) is not int or header["seeds"] < 0 or len(set(names)) != len(names):
        raise ValueError
    if total > EXPANSION * size + (1 << 20):
        raise damaged("it claims more than its bytes can hold")
