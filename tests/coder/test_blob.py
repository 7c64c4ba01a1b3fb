"""The coder without torch: the bytes of the operators and of NumPy, whichever answers, and the same refusals."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import damaged_blobs
from gaugekit import _build
from gaugekit.coder import binary, blob, header
from gaugekit.ops.rans import operator as rans

NEEDED = pytest.mark.skipif(not binary.backend().loaded, reason="needs the C++ binary")
CASES = [(dtype, symbols) for dtype, element in blob.ELEMENTS.items() for symbols in element.symbols]


@pytest.fixture(params=[pytest.param("C++", marks=NEEDED), "NumPy"])
def answers(request, monkeypatch):
    """Who does the work."""
    if request.param == "NumPy":
        monkeypatch.setattr(binary, "library", lambda: None)
    return request.param


def values(dtype, shape=(3, 11_000), seed=0):
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, blob.ELEMENTS[dtype].torch)
    tensor = torch.randn(shape, generator=generator)
    return (tensor * 20).to(kind) if dtype == "I8" else (tensor * 0.02).to(kind)


def as_bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().copy()


@pytest.mark.parametrize(("dtype", "symbols"), CASES)
def test_it_makes_and_reads_the_operators_blobs(answers, dtype, symbols):
    tensor = values(dtype)
    data, width = as_bytes(tensor), blob.ELEMENTS[dtype].width
    assert width == tensor.itemsize
    coded = blob.encode_bytes(data, (3, 11_000), dtype, symbols)
    expected = rans.encode(tensor, symbols, blob.usual_chunk_log2(symbols))
    assert coded.tobytes() == expected.numpy().tobytes()
    assert blob.open_blob(coded) == (dtype, (3, 11_000))
    for start, stop in ((0, 33_000), (5, 20_001), (17, 17)):
        out = np.full((stop - start) * width, 77, np.uint8)
        blob.decode(coded, start, stop, out)
        assert (out == data[start * width : stop * width]).all()


def test_what_was_not_asked_for_is_usual(answers):
    data = as_bytes(values("BF16"))
    for dtype, usual in (("BF16", "exponent"), ("F16", "high-byte")):
        one = blob.encode_bytes(data, (33_000,), dtype)
        assert (one == blob.encode_bytes(data, (33_000,), dtype, usual)).all()
    assert [blob.usual_chunk_log2(name) for name in ("exponent", "exponent-and-mantissa")] == [17, 18]


def test_shapes_without_dimensions_or_elements(answers):
    for shape in ((), (0, 5), (1,) * header.MAX_RANK):
        data = as_bytes(values("F32", shape))
        coded = blob.encode_bytes(data, shape, "F32")
        assert blob.open_blob(coded) == ("F32", shape)
        out = np.empty(data.size, np.uint8)
        blob.decode(coded, 0, data.size // 4, out)
        assert (out == data).all()


def test_memory_that_is_given_is_used(answers):
    data, taken = as_bytes(values("BF16")), []

    def room(size):
        taken.append(np.empty(size, np.uint8))
        return taken[-1]

    coded = blob.encode_bytes(data, (33_000,), "BF16", room=room)
    if answers == "C++":
        assert len(taken) == 1 and np.shares_memory(coded, taken[0])
    assert (coded == blob.encode_bytes(data, (33_000,), "BF16")).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "symbols"),
    [((32_999,), "BF16", None), ((33_000,), "F16", "exponent"), ((33_000, *[1] * 64), "BF16", None)],
)
def test_what_does_not_fit_is_refused(answers, shape, dtype, symbols):
    with pytest.raises(ValueError, match="do not fit"):
        blob.encode_bytes(as_bytes(values("BF16")), shape, dtype, symbols)


def test_no_range_of_the_blob_is_no_damage(answers):
    coded = blob.encode_bytes(as_bytes(values("BF16")), (33_000,), "BF16")
    for start, stop, size in ((0, 33_001, 66_002), (9, 8, 0), (-1, 3, 8), (0, 10, 19)):
        with pytest.raises(RuntimeError, match="not a range of the blob"):
            blob.decode(coded, start, stop, np.empty(size, np.uint8))


def test_damage_is_one_error(answers):
    """Some of what tests/codec/test_damage.py has whole."""
    for name, damaged in list(damaged_blobs.every().items())[:: 1 if answers == "C++" else 9]:
        data = np.frombuffer(damaged, np.uint8)
        with pytest.raises(blob.CorruptFile, match="not a sound coded blob: "):
            count = math.prod(blob.open_blob(data)[1])
            blob.decode(data, 0, count, np.empty(2 * count, np.uint8))
            raise AssertionError(name)


def test_a_checksum_goes_on_from_what_came_before(answers):
    assert blob.crc32c(b"123456789") == 0xE3069283
    assert blob.crc32c(b"6789", blob.crc32c(b"12345")) == 0xE3069283
    assert blob.crc32c(np.zeros(0, np.uint8)) == 0


def threads_of(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}from gaugekit.coder.blob import threads; print(threads())"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_threads_are_torchs_number_or_what_it_would_be():
    spared = (
        "import sys; sys.argv = ['gaugekit', 'pack']; import gaugekit; assert 'torch' not in sys.modules; "
    )
    assert threads_of(spared, OMP_NUM_THREADS="3") == 3
    assert threads_of(spared, OMP_NUM_THREADS="") == len(os.sched_getaffinity(0))
    assert threads_of("import torch; torch.set_num_threads(5); ") == 5


@NEEDED
def test_a_library_without_its_functions_is_named(monkeypatch, tmp_path):
    (tmp_path / "_codec.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(_build, "FOLDER", tmp_path)
    found, backend = binary._loaded.__wrapped__()
    assert found is None and "_codec.abi3.so does not load" in backend.why and "pip install" in backend.remedy
