"""gk.codec.encode, decode, decode_range: the tensor comes back bit for bit, the input stays as it was."""

import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gaugekit as gk
from gaugekit.ops.rans import operator as rans

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(*(t.contiguous().view(INTEGER[t.element_size()]) for t in (a, b)))
    )


def normal(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    scale = 0.02 if dtype.is_floating_point else 20
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * scale).to(dtype)


@settings(max_examples=80, deadline=None)
@given(dtype=st.sampled_from(DTYPES), data=st.binary(max_size=4000))
def test_arbitrary_bits_come_back(dtype, data):
    width = torch.empty(0, dtype=dtype).element_size()
    data = bytearray(data[: len(data) // width * width])
    tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    assert same(gk.codec.decode(gk.codec.encode(tensor)), tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_exponent_every_kind_of_number(dtype):
    """All 2^16 patterns of the upper half: every exponent, both signs, NaN payloads, denormals,
    infinities.
    """
    upper = torch.arange(1 << 16, dtype=torch.int32)
    patterns = upper << 16 | 0x1234 if dtype == torch.float32 else upper.to(INTEGER[dtype.itemsize])
    tensor = patterns.view(dtype)
    skewed = torch.cat([tensor, tensor[16000:16064].repeat(3200)])  # compressible, so that it is coded
    for case in (tensor, skewed):
        blob = gk.codec.encode(case)
        assert same(gk.codec.decode(blob), case)
    assert len(blob) < 0.95 * skewed.numel() * skewed.element_size()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (3, 0, 5), (63,), (64,), (5, 13), (2, 1, 3, 1, 700), (1 << 18,)]
)
def test_shapes(dtype, shape):
    tensor = normal(*shape, dtype=dtype)
    assert same(gk.codec.decode(gk.codec.encode(tensor)), tensor)


@pytest.mark.parametrize("chunk_log2", range(14, 21))
def test_chunk_sizes(chunk_log2):
    tensor = normal(300_001)
    assert same(gk.codec.decode(gk.codec.encode(tensor, chunk_log2=chunk_log2)), tensor)


@pytest.mark.parametrize("symbols", rans.SYMBOLS[torch.bfloat16])
def test_symbols_of_bfloat16(symbols):
    tensor = normal(50_000)
    assert same(gk.codec.decode(gk.codec.encode(tensor, symbols=symbols)), tensor)
    sizes = [
        len(gk.codec.encode(tensor, symbols=s)) for s in ("exponent-and-mantissa", "exponent", "high-byte")
    ]
    assert sizes == sorted(set(sizes)) and len(gk.codec.encode(tensor)) == sizes[1]


def test_normal_weights_take_the_entropy():
    """Order-0 entropy of the exponents of N(0, 0.02^2) in bf16 is 2.5455 bits; chunk, table and states add <
    0.05.
    """
    blob = gk.codec.encode(normal(1 << 20))
    assert 10.5455 < 8 * len(blob) / (1 << 20) < 10.6


def test_strides_and_gradients():
    tensor = normal(70, 90)
    parameter = torch.nn.Parameter(normal(40, 30, dtype=torch.float32))
    for case in (tensor.t(), tensor[::3, 5:50], tensor.expand(3, 70, 90), tensor.flip(0), parameter.detach()):
        assert same(gk.codec.decode(gk.codec.encode(case)), case)
    assert same(gk.codec.decode(gk.codec.encode(parameter)), parameter.detach())


def test_input_is_left_as_it_was(tmp_path):
    tensor = normal(5000)
    copy = tensor.clone()
    blob = gk.codec.encode(tensor)
    assert same(tensor, copy)
    kept = bytes(bytearray(blob))
    gk.codec.decode(blob)
    gk.codec.decode_range(blob, 10, 20)
    assert blob == kept and isinstance(blob, bytes)
    assert gk.codec.encode(tensor) == blob

    (tmp_path / "blob").write_bytes(blob)
    with (
        (tmp_path / "blob").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert same(gk.codec.decode(mapped), tensor)
    read_only = np.frombuffer(blob, np.uint8)
    odd = bytearray(1 + len(blob))
    odd[1:] = blob
    for view in (bytearray(blob), memoryview(blob), read_only, torch.tensor(list(blob), dtype=torch.uint8)):
        assert same(gk.codec.decode(view), tensor)
    assert same(gk.codec.decode(memoryview(odd)[1:]), tensor)  # not aligned
    strided = torch.tensor(list(blob), dtype=torch.uint8).repeat_interleave(2)[::2]
    assert same(gk.codec.decode(strided), tensor)


def test_reading_bytes_warns_of_nothing(recwarn):
    gk.codec.decode(gk.codec.encode(normal(100)))
    assert not recwarn.list


def test_out():
    tensor = normal(33, 1000, dtype=torch.float32)
    blob = gk.codec.encode(tensor)
    out = torch.empty_like(tensor)
    assert gk.codec.decode(blob, out=out) is out
    assert same(out, tensor)
    for wrong in (
        torch.empty(33, 999),
        torch.empty(1000, 33).t(),
        torch.empty(33, 1000, dtype=torch.float16),
        torch.empty(33, 1000, device="meta"),
        torch.nn.Parameter(torch.empty(33, 1000)),
        np.empty((33, 1000), np.float32),
    ):
        with pytest.raises(ValueError, match="out: expected a contiguous CPU tensor"):
            gk.codec.decode(blob, out=wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_range(dtype):
    tensor = normal(3, 30_000, dtype=dtype)
    flat = tensor.flatten()
    blob = gk.codec.encode(tensor, chunk_log2=14)
    edges = [0, 1, 63, 16383, 16384, 16385, 40000, 65536, 89999, 90000]
    for start in edges:
        for stop in edges:
            if start <= stop:
                assert same(gk.codec.decode_range(blob, start, stop), flat[start:stop])
    out = torch.empty(100, dtype=dtype)
    assert gk.codec.decode_range(blob, 16_350, 16_450, out=out) is out
    assert same(out, flat[16_350:16_450])
    for start, stop in ((-1, 5), (5, 4), (0, 90_001)):
        with pytest.raises(ValueError, match=r"start, stop: expected 0 <= start <= stop <= 90000"):
            gk.codec.decode_range(blob, start, stop)


def test_decode_range_reads_only_its_chunks():
    tensor = normal(70_000)
    blob = bytearray(gk.codec.encode(tensor, chunk_log2=14))
    blob[-20] ^= 1
    assert same(gk.codec.decode_range(blob, 100, 16_000), tensor[100:16_000])
    with pytest.raises(gk.codec.CorruptFile):
        gk.codec.decode_range(blob, 69_000, 69_001)


@pytest.mark.parametrize("bad", [3, "text", torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), None])
def test_not_bytes(bad):
    with pytest.raises(ValueError, match="blob: expected bytes"):
        gk.codec.decode(bad)


def test_not_a_tensor():
    with pytest.raises(ValueError, match="tensor: expected a torch"):
        gk.codec.encode([1.0, 2.0])
