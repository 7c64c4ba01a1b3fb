"""Dtypes of .safetensors files that torch holds otherwise than one element in whole bytes, or not at all."""

import json

import pytest
import safetensors
import safetensors.torch
import torch

from gaugekit import codec

PAIRS = getattr(torch, "float4_e2m1fn_x2", None)


def as_bytes(tensor: torch.Tensor):
    return tensor.dtype, tensor.shape, tensor.view(torch.uint8).tolist()


@pytest.mark.skipif(PAIRS is None, reason="this torch has no 4-bit floats")
def test_pairs_of_4_bit_floats(tmp_path):
    codes = torch.arange(48, dtype=torch.uint8)
    tensors = {
        "matrix": codes[:24].reshape(6, 4).view(PAIRS),
        "row": codes[24:29].view(PAIRS),
        "every second row": codes[29:].resize_(4, 4).view(PAIRS)[::2],
        "empty": torch.zeros(0, 4, dtype=torch.uint8).view(PAIRS),
        "bytes": torch.zeros(3, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "scales": codes[:5].view(torch.float8_e8m0fnu).clone(),
        "weight": (torch.randn(100, 30) * 0.02).bfloat16(),
    }
    plain = dict(tensors, **{"every second row": codes[29:].resize_(4, 4)[::2].contiguous().view(PAIRS)})
    safetensors.torch.save_file(plain, tmp_path / "s")
    codec.save_file(tensors, tmp_path / "p")
    codec.pack(tmp_path / "s", tmp_path / "q")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
    codec.unpack(tmp_path / "p", tmp_path / "r")
    assert (tmp_path / "r").read_bytes() == (tmp_path / "s").read_bytes()
    for path in (tmp_path / "s", tmp_path / "p"):
        loaded = codec.load_file(path)
        assert {n: as_bytes(t) for n, t in loaded.items()} == {n: as_bytes(t) for n, t in plain.items()}
        with codec.safe_open(path) as ours, safetensors.safe_open(path, "pt") as theirs:
            part = ours.get_slice("matrix")
            assert part.get_dtype() == "F4" and part.get_shape() == theirs.get_slice("matrix").get_shape()
            assert part.get_shape() == [6, 8]
            for index in (slice(1, 3), 2, (slice(None), slice(1, 3)), [3, 1]):
                assert part[index].view(torch.uint8).tolist() == codes[:24].reshape(6, 4)[index].tolist()
    with pytest.raises(ValueError, match="needs a dimension to be stored"):
        codec.save_file({"one": tensors["row"][0]}, tmp_path / "x")


def written(path, dtype, shape, size):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    raw = json.dumps(
        {"a": entry, "w": {"dtype": "U8", "shape": [2], "data_offsets": [size, size + 2]}}
    ).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(range(size + 2)))


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "message"),
    [
        ("F4", [2, 1], 1, "the last dimension must be even"),
        ("F6_E2M3", [4], 3, "dtype F6_E2M3, which torch lacks"),
        ("F6_E3M2", [2, 4], 6, "dtype F6_E3M2, which torch lacks"),
        ("F6_E2M3", [0], 0, "which torch lacks"),
        ("NEW", [3], 5, "dtype NEW, which torch lacks"),
    ],
)
def test_what_torch_lacks_is_packed_and_named_when_it_is_loaded(tmp_path, dtype, shape, size, message):
    written(tmp_path / "a", dtype, shape, size)
    codec.pack(tmp_path / "a", tmp_path / "b", verify=True)
    codec.unpack(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    for name in "ab":
        with codec.safe_open(tmp_path / name) as file:
            assert file.get_slice("w")[:].tolist() == [size, size + 1] and file.keys() == ["a", "w"]
            for read in (file.get_tensor, file.get_slice):
                with pytest.raises(ValueError, match=f"{name}: tensor 'a' has .*{message}") as caught:
                    read("a")
                assert not isinstance(caught.value, codec.CorruptFile)


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F4", [3], 2), ("F4", [], 0), ("F6_E2M3", [3], 3)])
def test_elements_that_end_within_a_byte_are_damage(tmp_path, dtype, shape, size):
    written(tmp_path / "a", dtype, shape, size)
    with pytest.raises(codec.CorruptFile, match="does not take"):
        codec.safe_open(tmp_path / "a")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"__metadata__":{"\\ud800":"x"}}',
        b'{"__metadata__":{"x":"\\udfff"}}',
        b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"\\ud800","shape":[0],"data_offsets":[0,0]}}',
        b'{"a\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":' + b"[" * 100_000,
        b'{"__metadata__":' + b'{"a":' * 100_000,
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}',
    ],
    ids=["key", "value", "name", "dtype", "bytes", "deep", "deep metadata", "long number", "infinite number"],
)
def test_headers_of_no_text_or_no_end_are_one_clear_error(tmp_path, raw):
    (tmp_path / "a").write_bytes(len(raw).to_bytes(8, "little") + raw)
    for verb in (codec.safe_open, codec.load_file, lambda path: codec.pack(path, tmp_path / "b")):
        with pytest.raises(codec.CorruptFile, match="a: ") as caught:
            verb(tmp_path / "a")
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
