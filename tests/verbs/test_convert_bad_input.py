"""What convert refuses, before it has read a weight or written a byte."""

import json
import shutil
from collections import namedtuple

import pytest
import torch

safetensors_torch = pytest.importorskip("safetensors.torch")

from gaugekit.codec import pack  # noqa: E402
from gaugekit.rewrite import Rewrite  # noqa: E402
from gaugekit.symmetry import GaugeFix  # noqa: E402
from gaugekit.verbs.convert import convert  # noqa: E402

CONFIG = {"model_type": "bert", "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1}
PARTS = ("self.query", "self.key", "self.value", "output.dense")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    weights = {f"encoder.layer.0.attention.{part}.weight": torch.randn(4, 4) for part in PARTS}
    biases = {f"encoder.layer.0.attention.{part}.bias": torch.randn(4) for part in PARTS}
    safetensors_torch.save_file(weights | biases, path / "model.safetensors")
    return path


def refused(source, target, message, rewrites=None, **arguments):
    with pytest.raises(ValueError, match=message):
        convert(source, target, [GaugeFix()] if rewrites is None else rewrites, **arguments)
    assert not target.with_name(target.name + ".partial").exists()


def test_source(source, tmp_path):
    out = tmp_path / "out"
    refused(tmp_path / "nowhere", out, "expected a directory")
    (source / "config.json").write_text(json.dumps({**CONFIG, "model_type": "rwkv"}))
    refused(source, out, "expected one of .*bert, .*; got 'rwkv'")
    (source / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": {"quant_method": "awq"}})
    )
    refused(source, out, "stored as 'awq'")
    (source / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 2}))
    refused(source, out, "encoder.layer.1.attention.self.query.weight")


@pytest.mark.parametrize("leaf", ["lora_A.weight", "weight_scale_inv", "base_layer.weight"])
def test_a_projection_that_holds_more_than_its_family_says(source, tmp_path, leaf):
    """An adapter or a scale beside would no longer fit what is rewritten."""
    name = f"encoder.layer.0.attention.self.value.{leaf}"
    tensors = safetensors_torch.load_file(source / "model.safetensors") | {name: torch.ones(1, 4)}
    safetensors_torch.save_file(tensors, source / "model.safetensors")
    refused(source, tmp_path / "out", f"expected no more than weights, .* in its projections; got '{name}'")


def test_numbers_of_eight_bits_are_no_weights(source, tmp_path):
    tensors = safetensors_torch.load_file(source / "model.safetensors")
    name = "encoder.layer.0.attention.self.value.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    safetensors_torch.save_file(tensors, source / "model.safetensors")
    refused(source, tmp_path / "out", f"{name}: expected numbers of 16 bits or more, got torch.float8_e4m3fn")


def test_target(source, tmp_path):
    refused(source, source, "beside the source")
    refused(source, source / "inner", "beside the source")
    refused(source, tmp_path, "beside the source")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    refused(source, taken, "new or empty")
    refused(source, taken / "file", "new or empty")
    assert (taken / "file").read_text() == "mine"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="it is taken"):
        convert(source, tmp_path / "out", [GaugeFix()])
    assert (tmp_path / "out.partial" / "notes").read_text() == "mine"


def test_an_empty_target_and_missing_parents_are_fine(source, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", [GaugeFix()])
    convert(source, tmp_path / "a" / "b", [GaugeFix()])
    assert (tmp_path / "a" / "b" / "config.json").is_file() and (tmp_path / "empty" / "config.json").is_file()


def test_dtype(source, tmp_path):
    for dtype in ("int8", torch.int32, 16, "FP32"):
        refused(source, tmp_path / "out", "expected one of float64, float32, bfloat16, float16", dtype=dtype)


def test_disk(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    refused(source, tmp_path / "out", "bytes free in .*, got 1,000")


class Asks(Rewrite):
    name = "asks"
    needs_statistics = ("q",)

    def plan(self, config):
        return {"total": 0}

    def layer(self, view, statistics=None):
        return view


def test_calibration(source, tmp_path):
    refused(source, tmp_path / "out", "asks asks for statistics", rewrites=[Asks()])
    refused(
        source,
        tmp_path / "out",
        "expected a text file, got",
        rewrites=[Asks()],
        calibration=tmp_path / "none.txt",
    )
    (tmp_path / "text.txt").write_text("One sentence.")
    for rewrites in ([], [GaugeFix()]):
        text = tmp_path / "text.txt"
        refused(
            source,
            tmp_path / "out",
            "asks for statistics .*got it alone",
            rewrites=rewrites,
            calibration=text,
        )


def test_a_damaged_packed_file_is_named(source, tmp_path):
    pack(source, tmp_path / "packed")
    weights = tmp_path / "packed" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[20] ^= 1  # in the words that every packed file begins with
    weights.write_bytes(content)
    refused(tmp_path / "packed", tmp_path / "out", "does not begin as a packed file's does")
