"""A model that fits under a memory limit only packed; loading from plain and from packed directories."""

import json
import os
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

import gaugekit as gk  # noqa: E402
from gaugekit.hf.quantizer import GaugekitConfig  # noqa: E402
from gaugekit.integrations.packing import load_packed  # noqa: E402

TINY = dict(vocab_size=300, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2)  # fmt: skip
LARGE = dict(vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8,
             num_key_value_heads=8)  # fmt: skip
IDS = torch.arange(12)[None]

# The child limits its own address space to what it has after its imports and `allowance` bytes more, then loads through
# the same reader, plain or packed, and answers one token. Large tensors are mappings of their own: what is freed goes
# back to the system at once.
CHILD = """
import resource, sys, torch, transformers
from gaugekit.checkpoint import Checkpoint
from gaugekit.integrations import loading
from gaugekit.integrations.packing import load_packed
path, kind, allowance = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).bfloat16()(torch.arange(8)[None])
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + allowance, size + allowance))
if kind == "packed":
    model = load_packed(path)
elif kind == "config":
    from gaugekit.integrations.transformers import GaugekitConfig
    options = {"quantization_config": GaugekitConfig(packed=True), "dtype": torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
else:
    checkpoint = Checkpoint(path)
    model = loading.skeleton(checkpoint.path, torch.bfloat16)
    model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.names()}, assign=True)
with torch.no_grad():
    print(int(model(torch.arange(8)[None]).logits[0, -1].argmax()))
"""


def child(path, kind, allowance):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(path), kind, str(int(allowance))]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space as Linux does")
@pytest.mark.skipif(
    not gk._library.implementation("packed_linear"), reason="needs the C++ binary to be quick"
)
def test_a_model_that_fits_only_packed(tmp_path):
    config = transformers.LlamaConfig(**LARGE, dtype=torch.bfloat16)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    noise = (torch.randn(1 << 22) * 0.02).bfloat16()
    state = {name: noise[: w.numel()].view(w.shape).clone() if w.dim() > 1 else torch.ones(w.shape).bfloat16()
             for name, w in shapes.items()}  # fmt: skip
    directory, container = tmp_path / "plain", tmp_path / "container"
    directory.mkdir()
    safetensors.save_file(state, directory / "model.safetensors", {"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    allowance = 0.88 * sum(w.nbytes for w in state.values())
    gk.codec.pack(directory, container)
    packed = child(directory, "packed", allowance)
    config = child(container, "config", allowance)
    for done in (packed, config):
        assert done.returncode == 0, done.stderr[-2000:]
        assert 0 <= int(done.stdout) < LARGE["vocab_size"]
    assert config.stdout == packed.stdout
    plain = child(directory, "plain", allowance)
    assert plain.returncode != 0 and "memory" in plain.stderr.lower(), plain.stderr[-2000:]


@pytest.mark.parametrize("tied", [False, True])
def test_plain_and_packed_directories_give_the_same_model(tied, tmp_path):
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=tied)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    gk.codec.pack(tmp_path / "plain", tmp_path / "packed")
    options = {"quantization_config": GaugekitConfig(packed=True), "attn_implementation": "sdpa"}
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options).eval()
    for name in ("plain", "packed"):
        model = load_packed(tmp_path / name)
        assert (model.lm_head.packed is model.model.embed_tokens.packed) == tied
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, reference(IDS).logits)
        assert not any(parameter.is_meta for parameter in model.parameters())


def test_what_load_packed_refuses(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="dtype: expected torch.bfloat16 or torch.float16, got torch.float32"
    ):
        load_packed(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight"):
        load_packed(tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gaugekit"}})
    )
    with pytest.raises(ValueError, match="converted"):
        load_packed(tmp_path)
