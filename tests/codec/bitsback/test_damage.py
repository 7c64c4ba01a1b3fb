"""Damage is reported, never decoded: every bit, every length, and headers that claim what is not there."""

import json
import struct

import numpy as np
import pytest
import torch

from gaugekit import _library
from gaugekit.codec.bitsback import decode, encode
from gaugekit.codec.bitsback import payload as form
from gaugekit.ops.rans.operator import CorruptFile, crc32c
from sliced_groups import identical, model

pytestmark = pytest.mark.skipif(not _library.backends()["cpu"].loaded, reason="needs the C++ binary")


@pytest.fixture(scope="module", params=[torch.float16, torch.int8], ids=["fp16", "int8"])
def sound(request):
    groups, others, couplings = model([9, 12], request.param, multiple=2)
    payload, _ = encode(groups, others | {"embedding": torch.randn(300)}, couplings)
    return payload, decode(payload)


def resealed(data: np.ndarray) -> torch.Tensor:
    """With the checksum of what is there now: damage that only the later checks can see."""
    data = data.copy()
    data[-4:] = np.frombuffer(struct.pack("<I", crc32c(torch.from_numpy(data[:-4]))), np.uint8)
    return torch.from_numpy(data)


def rewritten(payload: torch.Tensor, change) -> torch.Tensor:
    """The payload with another header, its checksum right."""
    data = payload.numpy()
    magic, version, length, words = form.HEAD.unpack(data[: form.HEAD.size].tobytes())
    front = form.HEAD.size + form.STATES
    header = json.loads(data[front : front + length].tobytes())
    text = json.dumps(change(header)).encode()
    head = form.HEAD.pack(magic, version, len(text), words)
    states, rest = data[form.HEAD.size : front].tobytes(), data[front + length :].tobytes()
    return resealed(np.frombuffer(head + states + text + rest, np.uint8))


def test_one_flipped_bit_anywhere(sound):
    payload, _ = sound
    for place in range(payload.numel()):
        damaged = payload.clone()
        damaged[place] ^= 1 << place % 8
        with pytest.raises(CorruptFile):
            decode(damaged)


def test_one_flipped_bit_that_the_checksum_of_all_does_not_see(sound):
    """In words all over the stack and in every state: the tensors' own checksums and the seed still tell."""
    payload, _ = sound
    data = payload.numpy()
    length = form.HEAD.unpack(data[: form.HEAD.size].tobytes())[2]
    words = form.HEAD.size + form.STATES + length
    for place in [*range(form.HEAD.size, form.HEAD.size + form.STATES), *range(words, data.size - 4, 5)]:
        damaged = data.copy()
        damaged[place] ^= 1 << place % 8
        with pytest.raises(CorruptFile):
            decode(resealed(damaged))


def test_every_length(sound):
    payload, _ = sound
    for size in [*range(400), *range(400, payload.numel(), 97)]:
        with pytest.raises(CorruptFile):
            decode(payload[:size].clone())
    for more in (1, 2, 4):
        with pytest.raises(CorruptFile):
            decode(torch.cat([payload, torch.zeros(more, dtype=torch.uint8)]))


def test_random_bytes():
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 27, 28, 200, 5000):
        noise = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        with pytest.raises(CorruptFile):
            decode(noise)


def set_at(*path, to):
    def change(header):
        place = header
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to
        return header

    return change


TENSOR = ("groups", 0, "parts", 0, "tensors", 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: [],
        lambda header: None,
        lambda header: {},
        set_at("seeds", to=-1),
        set_at("seeds", to=10**30),
        set_at("seeds", to=True),
        set_at("groups", to=7),
        set_at("groups", 0, "dimension", to=8),
        set_at("groups", 0, "dimension", to=1 << 40),
        set_at("groups", 0, "bits", to=1),
        set_at("groups", 0, "bits", to=17),
        set_at("groups", 0, "bits", to=11),
        set_at("groups", 0, "pivots", to=10),
        set_at("groups", 0, "pivots", to=3),
        set_at("groups", 0, "pivots", to=-1),
        set_at("groups", 0, "choice", to="all"),
        set_at("groups", 0, "choice", to="listed"),
        set_at("groups", 0, "parts", to=[]),
        set_at("groups", 0, "parts", 0, "axis", to=0),
        set_at("groups", 0, "parts", 0, "axis", to=0.5),
        set_at("groups", 1, "couplings", to=[]),
        set_at(*TENSOR, "name", to=5),
        set_at(*TENSOR, "name", to="embedding"),
        set_at(*TENSOR, "dtype", to="complex64"),
        set_at(*TENSOR, "dtype", to="bfloat16"),
        set_at(*TENSOR, "shape", to=[9, -9]),
        set_at(*TENSOR, "shape", to=[1 << 31, 9]),
        set_at(*TENSOR, "shape", to=[10, 9]),
        set_at(*TENSOR, "shape", to=[]),
        set_at(*TENSOR, "table", to=[]),
        set_at(*TENSOR, "table", to=[[3, 4096]]),
        set_at(*TENSOR, "table", to=[[300, 4096]]),
        set_at(*TENSOR, "table", to=[[1, 2, 3]]),
        set_at(*TENSOR, "crc", to=0),
        set_at("others", 0, "shape", to=[1 << 31, 1 << 31]),
        set_at("others", 0, "shape", to=[[1]]),
        set_at("others", to=[]),
    ],
)
def test_headers_that_lie(sound, change):
    payload, tensors = sound
    assert identical(
        decode(rewritten(payload, lambda header: header)), tensors
    )  # the rewriting itself does no harm
    with pytest.raises(CorruptFile):
        decode(rewritten(payload, change))


def test_another_version_says_so(sound):
    data = sound[0].numpy().copy()
    data[8] = 2
    with pytest.raises(CorruptFile, match="version 2"):
        decode(torch.from_numpy(data))


@pytest.mark.parametrize("payload", [b"abc", torch.zeros(9), torch.zeros(2, 2, dtype=torch.uint8)])
def test_not_bytes(payload):
    with pytest.raises(ValueError, match="expected a uint8 tensor"):
        decode(payload)
