"""Packed, converted, truncated, sliced and SAS directories in a real vLLM (``make test-vllm``): in float32 the same
greedy tokens as in transformers, the same bits in memory, and errors instead of wrong weights.
"""

import os
import shutil
import subprocess
import sys

import pytest

from served_by_vllm import KINDS, Served, directories, own  # isort: skip - it says how vLLM starts

import torch
import vllm
from safetensors.torch import load_file, save_file

import gaugekit as gk
from gaugekit.integrations.vllm import plugin, register
from gaugekit.integrations.vllm.loader import PackedLoader
from gaugekit.integrations.vllm.quantization import Forms


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return directories(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("kind", KINDS)
def test_says_what_transformers_says(models, kind):
    served = Served(models(kind))
    assert type(served.model).__module__.startswith("gaugekit.integrations.vllm") == (kind != "plain")
    said = served.tokens()
    assert said == own(models(kind))
    assert all(len(set(tokens)) > 2 for tokens in said)  # a token that repeats itself says little


def test_a_packed_directory_is_the_plain_one(models):
    """In vLLM's own class, fused matrices and all: the same bits, the same tokens."""
    plain, packed = Served(models("plain")), Served(models("packed"), load_format="gaugekit")
    assert type(packed.model) is type(plain.model)
    ours, theirs = (dict(served.model.named_parameters()) for served in (packed, plain))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter.view(torch.int32), theirs[name].view(torch.int32)), name
    assert packed.tokens() == plain.tokens()


def test_a_converted_directory_packed(models, tmp_path):
    gk.codec.pack(models("converted"), tmp_path / "packed")
    assert Served(tmp_path / "packed", load_format="gaugekit").tokens() == own(models("converted"))


def damaged(directory, target, place):
    shutil.copytree(directory, target)
    file = target / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("place", [0.001, 0.5, 0.999])
def test_damage_is_an_error(models, tmp_path, place):
    damaged(models("packed"), tmp_path / "damaged", place)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Served(tmp_path / "damaged", load_format="gaugekit")


@pytest.mark.parametrize("name", ["layers.1.self_attn.v_proj.rows", "layers.0.mlp.up_proj.weight"])
def test_a_weight_that_is_missing_is_an_error(models, tmp_path, name):
    shutil.copytree(models("converted"), tmp_path / "less")
    tensors = load_file(tmp_path / "less" / "model.safetensors")
    del tensors[f"model.{name}"]
    save_file(tensors, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing"):
        Served(tmp_path / "less")


def test_registering_twice_changes_nothing(monkeypatch):
    from vllm import model_executor, plugins
    from vllm.config import LoadConfig

    register()
    calls = []
    monkeypatch.setattr(model_executor.model_loader, "register_model_loader", calls.append)
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    plugins.load_general_plugins()
    register()
    assert not calls
    loader = model_executor.model_loader.get_model_loader(LoadConfig(load_format="gaugekit"))
    assert type(loader) is PackedLoader
    assert set(plugin.MODELS) <= set(vllm.ModelRegistry.get_supported_archs())


def test_registering_brings_no_model_and_no_codec():
    code = (
        "import sys; from vllm.model_executor import model_loader, models;"
        "from vllm.model_executor.layers import linear;"
        "from gaugekit.integrations.vllm import register; before = set(sys.modules); register();"
        "new = {name for name in set(sys.modules) - before if not name.startswith('gaugekit.integrations.vllm')};"
        "assert not new, new;"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=os.environ)


class TestRefused:
    def config(self, **changes):
        return {"quant_method": "gaugekit", "version": 1, "modules": {}, **changes}

    def test_entries_that_vllm_would_ignore(self):
        with pytest.raises(ValueError, match="expected version 1, got 2"):
            Forms.from_config(self.config(version=2))
        with pytest.raises(ValueError, match="neutreno: expected none"):
            Forms.from_config(self.config(neutreno=0.5))
        with pytest.raises(ValueError, match="novelty"):
            Forms.from_config(self.config(novelty=1))
        with pytest.raises(ValueError, match="modules by name"):
            Forms.from_config(self.config(modules=None))

    def test_a_model_class_that_knows_no_forms(self):
        with pytest.raises(ValueError, match="GaugekitForCausalLM"):
            Forms.from_config(self.config()).get_quant_method(torch.nn.Linear(2, 2), "layers.0")

    def test_a_name_that_is_no_directory(self):
        from vllm.config import LoadConfig

        class Model:
            model = "someone/somewhere"

        with pytest.raises(ValueError, match="expected a local directory, got 'someone/somewhere'"):
            PackedLoader(LoadConfig(load_format="gaugekit")).download_model(Model)

    def test_a_directory_that_was_not_converted(self, models):
        directory = models("plain")
        with pytest.raises(ValueError, match="expected a directory that gaugekit converted or sliced"):
            Served(directory, hf_overrides={"architectures": ["GaugekitForCausalLM"]})
