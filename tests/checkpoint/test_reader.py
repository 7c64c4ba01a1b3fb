"""Reading: one file or shards, and every way a directory can be wrong."""

import json

import pytest
import torch

safetensors_torch = pytest.importorskip("safetensors.torch")

from gaugekit import codec  # noqa: E402
from gaugekit.checkpoint.reader import Checkpoint  # noqa: E402

CONFIG = {"model_type": "bert", "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1}


def write(path, shards=False):
    path.mkdir()
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64)}
    (path / "config.json").write_text(json.dumps(CONFIG))
    if shards:
        where = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            where[name] = f"model-0000{number + 1}-of-00002.safetensors"
            safetensors_torch.save_file({name: tensor}, path / where[name])
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        safetensors_torch.save_file(tensors, path / "model.safetensors")
    return tensors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_reads(tmp_path, shards, packed):
    tensors = write(tmp_path / "m", shards)
    if packed:
        codec.pack(tmp_path / "m", tmp_path / "p")
    checkpoint = Checkpoint(tmp_path / ("p" if packed else "m"))
    assert checkpoint.config == CONFIG
    assert checkpoint.names() == ["a", "b"]
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.bytes(name) == tensor.nbytes
    assert len(checkpoint.sha256()) == (3 if shards else 2)


def test_damage_and_absence_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected a directory"):
        Checkpoint(tmp_path / "nowhere")
    model = tmp_path / "m"
    write(model)
    with pytest.raises(ValueError, match="tensor named 'zebra'"):
        Checkpoint(model).read("zebra")
    (model / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}")
    with pytest.raises(ValueError, match="no intact safetensors"):
        Checkpoint(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="got neither"):
        Checkpoint(model)
    (model / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled files such as pytorch_model.bin are converted"):
        Checkpoint(model)
    for broken in ("{", "[]"):
        (model / "config.json").write_text(broken)
        with pytest.raises(ValueError, match="config.json|JSON object"):
            Checkpoint(model)
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match="expected config.json in"):
        Checkpoint(model)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, "weight_map"),
        ({"a": "../a.safetensors"}, "of the directory"),
        ({"a": "missing.safetensors"}, "expected the file missing.safetensors"),
        ({"zebra": "model-00001-of-00002.safetensors"}, "promises 'zebra'"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, where, message):
    write(tmp_path / "m", shards=True)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path / "m")


def test_a_tensor_that_the_index_forgot_is_read_all_the_same(tmp_path):
    """Loaders read shards whole; a conversion that skipped it would lose it."""
    tensors = write(tmp_path / "m", shards=True)
    shard = tmp_path / "m" / "model-00002-of-00002.safetensors"
    safetensors_torch.save_file({"b": tensors["b"], "c": torch.ones(2)}, shard)
    assert Checkpoint(tmp_path / "m").names() == ["a", "b", "c"]
    safetensors_torch.save_file({"b": tensors["b"], "a": torch.ones(2)}, shard)
    with pytest.raises(ValueError, match="expected 'a' in one file"):
        Checkpoint(tmp_path / "m")


def test_one_file_beside_shards_is_refused(tmp_path):
    """Some loaders take the one file and others the shards."""
    write(tmp_path / "m", shards=True)
    safetensors_torch.save_file({"a": torch.zeros(2, 3)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match="got both"):
        Checkpoint(tmp_path / "m")


ODD = {
    "deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "not UTF-8": b'{"a": "\xe9"}',
    "many digits": '{"hidden_size": ' + "9" * 5000 + "}",
    "cut short": '{"hidden_size": 4',
    "a number": "5",
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_odd_json_is_refused_by_name(tmp_path, text, name):
    write(tmp_path / "m", shards=True)
    (tmp_path / "m" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        Checkpoint(tmp_path / "m")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("quantization_config", "x"),
        ("quantization_config", []),
        ("quantization_config", {}),
        ("quantization_config", {"quant_method": 5}),
        ("hidden_size", "4"),
        ("hidden_size", -4),
        ("hidden_size", 4.0),
        ("hidden_size", float("nan")),
        ("hidden_size", 10**30),
        ("num_attention_heads", 0),
        ("num_attention_heads", True),
        ("num_hidden_layers", 10**9),
        ("model_type", 5),
        ("architectures", "BertModel"),
        ("architectures", [5]),
        ("rope_parameters", [1]),
        ("rope_theta", float("inf")),
        ("layer_norm_eps", "1e-12"),
        ("is_decoder", "yes"),
    ],
)
def test_an_odd_entry_is_named(tmp_path, entry, value):
    write(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**CONFIG, entry: value}))
    with pytest.raises(ValueError, match=f"config.json: {entry}: expected .*, got "):
        Checkpoint(tmp_path / "m")


def test_null_means_no_quantization(tmp_path):
    write(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": None}))
    assert Checkpoint(tmp_path / "m").config == CONFIG
