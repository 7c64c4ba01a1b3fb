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

# Each kind is a fork of one process that has imported everything: it limits its own address space to what it has then
# and `allowance` bytes more, loads through the same reader, plain or packed, and answers one token. Large tensors are
# mappings of their own: what is freed goes back to the system at once.
CHILD = """
import os, resource, sys, torch, transformers
from gaugekit.checkpoint import Checkpoint
from gaugekit.hf import loading
from gaugekit.integrations.packing import load_packed
from gaugekit.integrations.transformers import GaugekitConfig
folder, allowance = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).bfloat16()(torch.arange(8)[None])
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024

def answer(path, kind):
    resource.setrlimit(resource.RLIMIT_AS, (size + allowance, size + allowance))
    if kind == "packed":
        model = load_packed(path)
    elif kind == "config":
        options = {"quantization_config": GaugekitConfig(packed=True), "dtype": torch.bfloat16}
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    else:
        checkpoint = Checkpoint(path)
        model = loading.skeleton(checkpoint.path, torch.bfloat16)
        model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.names()}, assign=True)
    with torch.no_grad():
        print(int(model(torch.arange(8)[None]).logits[0, -1].argmax()), flush=True)

for path, kind in zip(sys.argv[3::2], sys.argv[4::2]):
    if not (child := os.fork()):
        for number, name in (1, "out"), (2, "err"):
            os.dup2(os.open(f"{folder}/{kind}.{name}", os.O_WRONLY | os.O_CREAT), number)
        status = 1
        try:
            answer(path, kind)
            status = 0
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def children(folder, allowance, **paths):
    """{kind: (exit status, stdout, stderr)} of a child for each kind and its path."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    pairs = [str(x) for kind, path in paths.items() for x in (path, kind)]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), str(int(allowance)), *pairs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = ((folder / f"{kind}.{name}").read_text() for kind in paths for name in ("out", "err"))
    return {
        kind: (int(status), next(said), next(said))
        for kind, status in zip(paths, done.stdout.split(), strict=True)
    }


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
    ends = children(tmp_path, allowance, packed=directory, config=container, plain=directory)
    for status, answered, error in (ends["packed"], ends["config"]):
        assert status == 0, error[-2000:]
        assert 0 <= int(answered) < LARGE["vocab_size"]
    assert ends["config"][1] == ends["packed"][1]
    assert ends["plain"][0] != 0 and "memory" in ends["plain"][2].lower(), ends["plain"]


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
