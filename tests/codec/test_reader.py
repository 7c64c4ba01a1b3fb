"""gk.codec.safe_open and load_file say of packed and plain files what safetensors' functions say of the original."""

import threading

import pytest
import safetensors
import torch
from safetensors.torch import save_file

import gaugekit as gk
from gaugekit.codec.files import reader
from gaugekit.codec.tensors.pieces import StoredBlob

INDICES = [
    (...),
    (slice(None),),
    (slice(3, 20),),
    (slice(-5, None),),
    (slice(40, 60),),
    (slice(20, 3),),
    (slice(0, 30, 7),),
    (5,),
    (-1,),
    (slice(2, 9), slice(None, None, 3)),
    (slice(None), slice(10, 20)),
    (7, slice(3, 5)),
    ([1, 30, 2],),
]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.02

    noise = torch.randint(-(2**31), 2**31 - 1, (40, 90), generator=generator, dtype=torch.int32)
    return {
        "bf16": normal(40, 1300).bfloat16(),
        "fp16": normal(40, 50, 3).half(),
        "fp32": normal(40, 77),
        "noise": noise.view(torch.float32),
        "ids": torch.arange(400).reshape(40, 10),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "hollow": torch.empty(4, 0),
        "mask": torch.tensor([True, False, True]),
        "fp8": normal(40, 60).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(9).to(torch.uint32),
        'ünicode "quoted" 名': normal(600).bfloat16(),
    }


@pytest.fixture(params=["packed", "plain"])
def paths(request, tmp_path):
    """(the original file, the file to read)."""
    plain = tmp_path / "a.safetensors"
    save_file(tensors(), plain, metadata={"format": "pt"})
    if request.param == "plain":
        return plain, plain
    gk.codec.pack(plain, tmp_path / "b.safetensors")
    return plain, tmp_path / "b.safetensors"


def as_bytes(tensor: torch.Tensor):
    return tensor.dtype, tensor.shape, bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_says_what_safetensors_says(paths):
    plain, read = paths
    with safetensors.safe_open(plain, "pt") as theirs, gk.codec.safe_open(read) as ours:
        assert ours.keys() == theirs.keys() and ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() == theirs.metadata() == {"format": "pt"}
        assert ours.packed == (plain != read)
        for name in theirs.keys():  # noqa: SIM118
            assert as_bytes(ours.get_tensor(name)) == as_bytes(theirs.get_tensor(name))
            ours_slice, theirs_slice = ours.get_slice(name), theirs.get_slice(name)
            assert ours_slice.get_shape() == theirs_slice.get_shape()
            assert ours_slice.get_dtype() == theirs_slice.get_dtype()
    loaded = gk.codec.load_file(read)
    assert {n: as_bytes(t) for n, t in loaded.items()} == {n: as_bytes(t) for n, t in tensors().items()}


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "noise", "ids"])
def test_slices(paths, name, monkeypatch):
    monkeypatch.setattr(reader, "PIECE_BYTES", 1 << 16)
    expected = tensors()[name]
    with gk.codec.safe_open(paths[1]) as file:
        part = file.get_slice(name)
        for index in INDICES:
            index = index if index is ... or len(index) > 1 else index[0]
            assert as_bytes(part[index]) == as_bytes(expected[index]), index
        with pytest.raises(IndexError):
            part[40]
        assert as_bytes(file.get_slice("scalar")[...]) == as_bytes(tensors()["scalar"])
        assert file.get_slice("empty")[:3].shape == (0, 4) and file.get_slice("hollow")[1:3].shape == (2, 0)


def test_a_slice_decodes_only_the_chunks_it_needs(tmp_path, monkeypatch):
    weight = (torch.randn(1000, 1000) * 0.02).bfloat16()
    save_file({"weight": weight}, tmp_path / "a.safetensors")
    gk.codec.pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    seen = []
    decode = StoredBlob.decode
    monkeypatch.setattr(
        StoredBlob, "decode", lambda blob, *rest: seen.append(rest[2:4]) or decode(blob, *rest)
    )
    with gk.codec.safe_open(tmp_path / "b.safetensors") as file:
        assert torch.equal(file.get_slice("weight")[300:310], weight[300:310])
        assert torch.equal(file.get_slice("weight")[990:], weight[990:])
    assert seen == [(2, 3), (7, 8)]


def test_threads_read_one_file(tmp_path):
    expected = {str(i): (torch.randn(300, 1000) * 0.02).bfloat16() for i in range(6)}
    save_file(expected, tmp_path / "a.safetensors")
    gk.codec.pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with gk.codec.safe_open(tmp_path / "b.safetensors") as file:
        found = {}
        threads = [
            threading.Thread(target=lambda n=name: found.update({n: file.get_tensor(n)})) for name in expected
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bad_requests(paths):
    plain, read = paths
    with pytest.raises(FileNotFoundError):
        gk.codec.safe_open(plain.with_name("absent"))
    with pytest.raises(ValueError, match="framework: expected 'pt', got 'tf'"):
        gk.codec.safe_open(read, "tf")
    with gk.codec.safe_open(read) as file, pytest.raises(ValueError, match="its tensors, got 'zebra'"):
        file.get_tensor("zebra")
    with pytest.raises(ValueError, match="closed"):
        file.get_tensor("bf16")


def test_no_metadata_and_a_tensor_of_our_name(tmp_path):
    save_file({"gaugekit": torch.ones(3)}, tmp_path / "a.safetensors")
    gk.codec.pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for name in "ab":
        with gk.codec.safe_open(tmp_path / f"{name}.safetensors") as file:
            assert file.metadata() is None and torch.equal(file.get_tensor("gaugekit"), torch.ones(3))


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x02" + bytes(7) + b"[]", b"\x05" + bytes(7) + b"{}"])
def test_what_is_no_safetensors_file_is_named(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for verb in (gk.codec.safe_open, gk.codec.load_file, lambda p: gk.codec.pack(p, tmp_path / "out")):
        with pytest.raises(gk.codec.CorruptFile, match=r"model\.safetensors: "):
            verb(path)
