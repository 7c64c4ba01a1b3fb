"""gk.codec.encode(layout="fixed"): any bits come back, damage raises CorruptFile, decode tells the layouts apart."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gaugekit as gk
from gaugekit.codec.tensors import fixed
from gaugekit.reference.rans import crc32c

DTYPES = [torch.bfloat16, torch.float16]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


@settings(max_examples=40, deadline=None)
@given(dtype=st.sampled_from(DTYPES), data=st.binary(max_size=5000))
def test_arbitrary_bits_come_back(dtype, data):
    data = bytearray(data[: len(data) // 2 * 2])
    tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    assert same(gk.codec.decode(gk.codec.encode(tensor, layout="fixed")), tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (1024,), (5, 205), (2, 3, 70, 64)])
def test_shapes_strides_and_containers(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    blob = gk.codec.encode(tensor, layout="fixed")
    assert blob.dtype == torch.uint8 and blob.device == tensor.device
    misaligned = memoryview(b"x" + blob.numpy().tobytes())[1:]
    for given_as in (blob, blob.numpy().tobytes(), misaligned, torch.cat([blob[:1], blob])[1:]):
        assert same(gk.codec.decode(given_as), tensor)
    if tensor.dim() > 1:
        turned = gk.codec.encode(tensor.transpose(0, 1), layout="fixed")
        assert same(gk.codec.decode(turned), tensor.transpose(0, 1).contiguous())
    out = torch.empty_like(tensor)
    assert gk.codec.decode(blob, out=out) is out and same(out, tensor)
    flat, count = tensor.flatten(), tensor.numel()
    for start, stop in ((0, count), (count // 3, count // 2), (count, count)):
        assert same(gk.codec.decode_range(blob, start, stop), flat[start:stop])


def test_a_cache_takes_seven_tenths():
    cache = torch.randn(2, 4, 256, 128).bfloat16()
    blob = gk.codec.encode(cache, layout="fixed")
    assert blob.numel() < 0.71 * cache.nbytes
    assert len(gk.codec.encode(cache)) < blob.numel()


def test_every_flipped_byte_is_detected():
    tensor = torch.randn(300).bfloat16()
    blob = gk.codec.encode(tensor, layout="fixed")
    for place in range(blob.numel()):
        damaged = blob.clone()
        damaged[place] ^= 0x41
        with pytest.raises(gk.codec.CorruptFile):
            gk.codec.decode(damaged)
    for size in (0, 8, 40, 63, 64, 1000, blob.numel() - 1):
        with pytest.raises(gk.codec.CorruptFile):
            gk.codec.decode(blob[:size])


def resealed(data: bytes | bytearray, offset: int, format: str, *values) -> bytearray:
    """The same bytes with some of the header changed and its checksum made right."""
    data = bytearray(data)
    struct.pack_into("<" + format, data, offset, *values)
    begin = 48 + 16 * -(-8 * data[12] // 16)
    struct.pack_into("<I", data, 44, crc32c(bytes(data[:44]) + bytes(4) + bytes(data[48:begin])))
    return data


@pytest.mark.parametrize(
    ("offset", "format", "value"),
    [(8, "H", 2), (10, "B", 3), (11, "B", 5), (12, "B", 2), (12, "B", 65), (13, "B", 3), (16, "Q", 1 << 60),
     (16, "Q", 1 << 63), (24, "Q", 1 << 40), (24, "Q", 0), (48, "Q", 1 << 62)],
)  # fmt: skip
def test_hostile_headers_with_the_checksum_made_right(offset, format, value):
    data = gk.codec.encode(torch.randn(1500).bfloat16(), layout="fixed").numpy().tobytes()
    data = resealed(data, offset, format, value)
    with pytest.raises(gk.codec.CorruptFile, match="not a sound transfer blob"):
        gk.codec.decode(data)


def test_the_checksum_of_gpus_gives_the_same_tensor(monkeypatch):
    tensor = torch.randn(3000).bfloat16()
    plain = gk.codec.encode(tensor, layout="fixed")
    whole = fixed._checksum(plain[64:], fixed.WORD_SUM)
    monkeypatch.setattr(fixed, "SLAB", 100)
    assert fixed._checksum(plain[64:], fixed.WORD_SUM) == whole
    words = plain[64:].view(torch.int64).tolist()
    assert whole == sum((2 * i + 1) * w for i, w in enumerate(words)) % (1 << 64)
    data = resealed(plain.numpy().tobytes(), 32, "Q", whole)
    blob = torch.frombuffer(resealed(data, 13, "B", fixed.WORD_SUM), dtype=torch.uint8)
    assert same(gk.codec.decode(blob), tensor)
    for place in (70, 700, blob.numel() - 1):
        damaged = blob.clone()
        damaged[place] ^= 1
        with pytest.raises(gk.codec.CorruptFile, match="checksum"):
            gk.codec.decode(damaged)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    tensor = torch.randn(3, 8, 100, 128, device="cuda").to(dtype)
    blob = gk.codec.encode(tensor, layout="fixed")
    assert blob.is_cuda and same(gk.codec.decode(blob), tensor)
    assert same(gk.codec.decode(blob.cpu()), tensor.cpu())
    assert same(gk.codec.decode(gk.codec.encode(tensor.cpu(), layout="fixed").cuda()), tensor)


def test_bad_requests():
    tensor = torch.randn(10).bfloat16()
    for arguments, message in (
        ({"layout": "zip"}, "layout: expected one of"),
        ({"layout": "fixed", "symbols": "exponent"}, "expected None with layout='fixed'"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.codec.encode(tensor, **arguments)
    with pytest.raises(ValueError, match="expected bfloat16 or float16"):
        gk.codec.encode(tensor.float(), layout="fixed")
    with pytest.raises(ValueError, match="tensor: expected a torch"):
        gk.codec.encode([1.0], layout="fixed")
    blob = gk.codec.encode(tensor, layout="fixed")
    with pytest.raises(ValueError, match="out: expected a contiguous"):
        gk.codec.decode(blob, out=torch.empty(10))
    with pytest.raises(ValueError, match="0 <= start <= stop <= 10"):
        gk.codec.decode_range(blob, 5, 11)
