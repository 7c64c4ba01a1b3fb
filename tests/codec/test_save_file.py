"""gk.codec.save_file: packed at once, and unpacked what safetensors would have written."""

import pytest
import safetensors.torch
import torch

import gaugekit as gk


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b": (torch.randn(50, 70) * 0.02).bfloat16(),
        "a": torch.arange(3),
        "turned": torch.randn(100, 90).t(),
        "scalar": torch.tensor(2.0),
        "mask": torch.tensor([True]),
        "empty": torch.empty(0, 3),
        "half": torch.randn(5000).half(),
        "int8": torch.randint(-5, 5, (3000,), dtype=torch.int8),
        "double": torch.randn(3).double(),
        "parameter": torch.nn.Parameter(torch.randn(9)),
    }


def test_unpacks_to_what_safetensors_writes(tmp_path):
    given = tensors()
    gk.codec.save_file(given, tmp_path / "p", {"format": "pt"})
    plain = {name: tensor.detach().contiguous() for name, tensor in given.items()}
    safetensors.torch.save_file(plain, tmp_path / "s", {"format": "pt"})
    gk.codec.unpack(tmp_path / "p", tmp_path / "r")
    assert (tmp_path / "r").read_bytes() == (tmp_path / "s").read_bytes()
    gk.codec.pack(tmp_path / "s", tmp_path / "q")
    assert (tmp_path / "q").read_bytes() == (tmp_path / "p").read_bytes()
    loaded = gk.codec.load_file(tmp_path / "p")
    assert loaded.keys() == given.keys() and all(torch.equal(loaded[name], given[name]) for name in given)
    gk.codec.save_file({}, tmp_path / "p")
    assert gk.codec.load_file(tmp_path / "p") == {}


def test_refusals_leave_nothing(tmp_path):
    weight = torch.randn(10, 10)
    for given, metadata, message in (
        ([weight], None, "expected a dict of tensors by name, got list"),
        ({"a": 3}, None, "got 'a': int"),
        ({"__metadata__": weight}, None, "other than '__metadata__'"),
        ({"a": weight, "b": weight[2:]}, None, "'a' and 'b' share memory"),
        ({"a": weight.to(torch.complex128)}, None, "'a' has dtype torch.complex128"),
        ({"a": torch.zeros(3, device="meta")}, None, "'a' is none"),
        ({"a": weight}, {"n": 1}, "metadata: expected a dict of strings"),
        ({"\ud800": weight}, None, "expected Unicode text"),
        ({"a": weight}, {"note": "\udcff"}, "expected Unicode text"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.codec.save_file(given, tmp_path / "p", metadata)
    assert not list(tmp_path.iterdir())
    gk.codec.save_file({"a": weight[:5], "b": weight[5:]}, tmp_path / "p")  # one storage, no byte in common


def test_views_that_conjugate_or_negate_are_stored_as_they_look(tmp_path):
    waves = torch.randn(40, dtype=torch.complex64)
    views = {
        "conjugate": waves.conj(),
        "negative": torch._neg_view(torch.randn(50, 60).bfloat16()),
        "imaginary": torch.randn(30, dtype=torch.complex64).conj().imag,
    }
    assert views["conjugate"].is_conj() and views["negative"].is_neg() and views["imaginary"].is_neg()
    gk.codec.save_file(views, tmp_path / "p")
    loaded = gk.codec.load_file(tmp_path / "p")
    assert all(torch.equal(loaded[name], view) for name, view in views.items())
    plain = {name: view.resolve_conj().resolve_neg().contiguous() for name, view in views.items()}
    safetensors.torch.save_file(plain, tmp_path / "s")
    gk.codec.unpack(tmp_path / "p", tmp_path / "r")
    assert (tmp_path / "r").read_bytes() == (tmp_path / "s").read_bytes()
    for layout in ("rans", "fixed"):
        assert torch.equal(
            gk.codec.decode(gk.codec.encode(views["negative"], layout=layout)), views["negative"]
        )
    with pytest.raises(ValueError, match="out: expected memory to write to"):
        gk.codec.decode(gk.codec.encode(plain["negative"]), views["negative"])
