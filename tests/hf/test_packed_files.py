"""A packed directory loads through from_pretrained once gaugekit.integrations.transformers is imported."""

import json
import subprocess
import sys

import pytest
import safetensors
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
import gaugekit.integrations.transformers as integration  # noqa: E402
from gaugekit.symmetry import GaugeFix  # noqa: E402

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 96}
TOKENS = torch.arange(22).reshape(2, 11)


def llama(**changes):
    sizes = {**SIZES, "num_key_value_heads": 2, "vocab_size": 300, **changes}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval().bfloat16()


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=300)).eval()


def load(path, auto="AutoModelForCausalLM", **arguments):
    model, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True, **arguments)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    return model


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("shards", ["1GB", "100KB"])
def test_loads_as_the_plain_directory_does(tmp_path, shards):
    llama().save_pretrained(tmp_path / "m", max_shard_size=shards)
    gk.codec.pack(tmp_path / "m", tmp_path / "p")
    files = list((tmp_path / "p").glob("*.safetensors"))
    assert (len(files) > 2) == (shards == "100KB")
    for dtype in (torch.bfloat16, "auto", torch.float32):
        model = load(tmp_path / "p", dtype=dtype)
        assert same(model, load(tmp_path / "m", dtype=dtype))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, load(tmp_path / "m", dtype=torch.float32)(TOKENS).logits)
    model.save_pretrained(tmp_path / "again")
    assert same(load(tmp_path / "again", dtype=torch.float32), model)


def test_a_converted_directory_packed(tmp_path):
    bert().save_pretrained(tmp_path / "m")
    gk.convert(tmp_path / "m", tmp_path / "c", [GaugeFix()])
    gk.codec.pack(tmp_path / "c", tmp_path / "p")
    assert same(load(tmp_path / "p", "AutoModel"), load(tmp_path / "c", "AutoModel"))


def test_packed_in_memory_too(tmp_path):
    llama().save_pretrained(tmp_path / "m")
    gk.codec.pack(tmp_path / "m", tmp_path / "p")
    arguments = {"dtype": torch.bfloat16, "quantization_config": integration.GaugekitConfig(packed=True)}
    with torch.no_grad():
        found = load(tmp_path / "p", **arguments)(TOKENS).logits
        assert torch.equal(found, load(tmp_path / "m", **arguments)(TOKENS).logits)


def test_damage_names_the_file(tmp_path):
    llama().save_pretrained(tmp_path / "m")
    gk.codec.pack(tmp_path / "m", tmp_path / "p")
    path = tmp_path / "p" / "model.safetensors"
    data = bytearray(path.read_bytes())
    for place in (20, len(data) // 2):
        damaged = data.copy()
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(gk.codec.CorruptFile, match=r"p/model\.safetensors: "):
            transformers.AutoModel.from_pretrained(tmp_path / "p")


def test_inspect_verify_and_convert_read_packed_directories(tmp_path):
    bert().save_pretrained(tmp_path / "m")
    gk.codec.pack(tmp_path / "m", tmp_path / "p")
    assert gk.inspect(tmp_path / "p").fields == gk.inspect(tmp_path / "m").fields
    report = gk.verify(tmp_path / "m", tmp_path / "p")
    assert report["ok"] and report["max_abs_error"] == 0 and report["dtype"] == "float32"
    gk.convert(tmp_path / "m", tmp_path / "a", [GaugeFix()])
    gk.convert(tmp_path / "p", tmp_path / "b", [GaugeFix()])
    assert same(load(tmp_path / "a", "AutoModel"), load(tmp_path / "b", "AutoModel"))


def test_without_gaugekit_transformers_refuses(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "m")
    gk.codec.pack(tmp_path / "m", tmp_path / "p")
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", safetensors.safe_open)
    with pytest.raises(RuntimeError, match="size"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "p")


PEAK = """
import json, re, sys, torch, transformers
import gaugekit.integrations.transformers
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) << 10
small, large = sys.argv[1:]
transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = transformers.AutoModelForCausalLM.from_pretrained(large, dtype=torch.bfloat16)
size = sum(p.nbytes for p in model.parameters())
layer = sum(p.nbytes for p in model.model.layers[0].parameters())
print(json.dumps({"peak": status("VmHWM") - before, "model": size, "layer": layer}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_a_layer_above_the_model(tmp_path):
    llama().save_pretrained(tmp_path / "s")
    gk.codec.pack(tmp_path / "s", tmp_path / "small")
    large = llama(hidden_size=768, intermediate_size=2048, num_hidden_layers=5)
    large.save_pretrained(tmp_path / "l", max_shard_size="30MB")
    gk.codec.pack(tmp_path / "l", tmp_path / "large")
    command = [sys.executable, "-W", "ignore", "-c", PEAK, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] <= found["model"] + found["layer"], found
