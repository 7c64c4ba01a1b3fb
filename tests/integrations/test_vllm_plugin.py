"""What vLLM loads in each of its processes, without vLLM: the entry point, what it imports, what its loader reads."""

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

safetensors = pytest.importorskip("safetensors.torch")

import gaugekit as gk  # noqa: E402
from gaugekit.integrations.vllm import register  # noqa: E402
from gaugekit.integrations.vllm.weights import weights  # noqa: E402

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.int64: torch.int64}


def save(folder, shards):
    """A directory of ``shards`` files, tensors of several dtypes and sizes in them; {name: tensor}."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensors, where = {}, {}
    for shard in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        held = {
            f"z.{shard}.weight": (torch.randn(300, 70, generator=generator) * 0.02).bfloat16(),
            f"a.{shard}.weight": torch.randn(40, 30, generator=generator),
            f"a.{shard}.odd": torch.tensor([0.0, -0.0, float("inf"), float("nan")]).bfloat16(),
            f"a.{shard}.rows": torch.arange(5),
        }
        safetensors.save_file(held, folder / name, metadata={"format": "pt"})
        tensors |= held
        where |= dict.fromkeys(held, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def bits(tensor):
    return tensor.view(BITS[tensor.dtype])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_weights_are_those_of_safetensors(tmp_path, shards, packed):
    save(tmp_path / "plain", shards)
    gk.codec.pack(tmp_path / "plain", tmp_path / "packed")
    expected = []
    for file in sorted((tmp_path / "plain").glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as opened:
            expected += [(name, opened.get_tensor(name)) for name in opened.offset_keys()]
    read = list(weights(tmp_path / ("packed" if packed else "plain")))
    assert [name for name, _ in read] == [name for name, _ in expected]
    for (_, ours), (_, theirs) in zip(read, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(bits(ours), bits(theirs))


def test_one_tensor_is_read_at_a_time(tmp_path):
    """What has been yielded stays right although the file is spoilt behind it: nothing is read ahead."""
    tensors = save(tmp_path / "plain", 1)
    gk.codec.pack(tmp_path / "plain", tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    with gk.codec.safe_open(file) as opened:
        names = opened.offset_keys()
        assert opened.packed
    reading = weights(tmp_path / "packed")
    name, first = next(reading)
    assert name == names[0] and torch.equal(bits(first), bits(tensors[name]))
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size - 400)
        opened.write(bytes(400))
    with pytest.raises(gk.codec.CorruptFile, match=r"packed/model\.safetensors: "):
        list(reading)


def test_damage_is_never_a_tensor(tmp_path):
    tensors = save(tmp_path / "plain", 1)
    gk.codec.pack(tmp_path / "plain", tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    sound = file.read_bytes()
    refused = 0
    for place in range(3, len(sound), len(sound) // 60):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 0x10]) + sound[place + 1 :])
        try:
            for name, tensor in weights(tmp_path / "packed"):
                assert torch.equal(bits(tensor), bits(tensors[name])), f"byte {place}: {name} is wrong"
        except ValueError as error:
            refused += "model.safetensors" in str(error)
    assert refused > 50, f"expected nearly every changed byte to be noticed, got {refused} of 60"


def test_what_is_missing_is_said_before_the_first_tensor(tmp_path):
    save(tmp_path / "plain", 3)
    gk.codec.pack(tmp_path / "plain", tmp_path / "packed")
    (tmp_path / "packed" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="expected the file model-00002-of-00003"):
        weights(tmp_path / "packed")
    with pytest.raises(ValueError, match="expected a directory"):
        weights(tmp_path / "nothing")


def test_the_entry_point_is_declared():
    """As setuptools builds it into the metadata; .ci/smoke.py looks for it in the wheel."""
    project = Distribution()
    project.parse_config_files([str(PROJECT)])
    (line,) = project.entry_points["vllm.general_plugins"]
    name, place = line.split(" = ")
    assert name == "gaugekit" and EntryPoint(name, place, "vllm.general_plugins").load() is register


def test_the_plugin_imports_nothing_heavy():
    """What vLLM imports in each process, to find ``register``."""
    code = (
        "import sys, torch; import gaugekit; before = set(sys.modules); import gaugekit.integrations.vllm;"
        "new = {name for name in set(sys.modules) - before if not name.startswith('gaugekit.integrations')};"
        "assert not new, new; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_is_named():
    with pytest.raises(ImportError, match="gaugekit.integrations.vllm needs vLLM"):
        register()
