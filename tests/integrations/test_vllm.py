"""Packed, converted, truncated, sliced and SAS directories in a real vLLM (``make test-vllm``): in float32 the same
greedy tokens as in transformers, the same bits in memory, and errors instead of wrong weights.
"""

import os
import shutil
import subprocess
import sys

import pytest

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
                  VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_HOST_IP="127.0.0.1")  # fmt: skip
pytest.importorskip("vllm", reason="make test-vllm installs vLLM")

import torch
import transformers
import vllm
from safetensors.torch import load_file, save_file

import gaugekit as gk
import gaugekit.integrations.transformers
from gaugekit.integrations.sas import SASConfig, SASForCausalLM
from gaugekit.integrations.vllm import plugin, register
from gaugekit.integrations.vllm.loader import PackedLoader
from gaugekit.integrations.vllm.quantization import Forms
from sliceable import WORDS
from tiny import add_tokenizer

PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 30, 40], [*range(2, 42)], [3]]
SHARED = dict(
    vocab_size=64, hidden_size=128, num_hidden_layers=2, bos_token_id=0, eos_token_id=1, pad_token_id=0
)
LLAMA = dict(SHARED, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=96,
             max_position_embeddings=256)  # fmt: skip
SAS = {
    "sas": dict(SHARED, num_attention_heads=4, num_key_value_heads=2, rope=True),
    "sas_p with all matrices": dict(
        SHARED, num_attention_heads=2, block="sas_p", values=True, outputs=True, tie_word_embeddings=False
    ),
    "sas with a window": dict(SHARED, num_attention_heads=4, key_width=16, sliding_window=5),
    "standard blocks": dict(SHARED, num_attention_heads=4, block="pre_ln", tie_word_embeddings=False),
}
SLICED = {
    "sliced": ("plain", {"rotation": "polar"}),
    "sliced, tied": ("tied", {}),
    "sliced with its head": ("plain", {"head": True}),
    "sliced with its head, tied": ("tied", {"head": True}),
}
KINDS = ["plain", "converted", "truncated", *SLICED, *SAS]


def spread(model, std):
    """The model with numbers drawn so wide that what it says does not repeat itself."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            gain = parameter.dim() == 1
            parameter.normal_(1.0 if gain else 0.0, 0.3 if gain else std)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that writes the directory of a kind, where it does not stand yet."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(WORDS * 12)

    def write(kind, target):
        if kind in ("plain", "tied"):
            config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=kind == "tied")
            model = transformers.LlamaForCausalLM(config)
            spread(model, 0.3 if kind == "tied" else 0.1).bfloat16().save_pretrained(target)
            add_tokenizer(target)
        elif kind == "packed":
            gk.codec.pack(models("plain"), target)
        elif kind == "converted":
            gk.convert(models("plain"), target, [gk.symmetry.GaugeFix()], dtype="float32")
        elif kind == "truncated":
            gk.convert(models("plain"), target, [gk.rank.Truncate(32)], dtype="float32")
        elif kind in SLICED:
            source, options = SLICED[kind]
            options = {"calibration": folder / "text.txt", "window": 32, "windows": 8, **options}
            gk.slicing.slice(models(source), target, 0.25, **options)
        else:
            spread(SASForCausalLM(SASConfig(**SAS[kind])), 0.3).save_pretrained(target)

    def models(kind):
        target = folder / kind.replace(" ", "-").replace(",", "")
        if not target.exists():
            write(kind, target)
        return target

    return models


class Served:
    """A directory in a vLLM of this process, and what it answers."""

    def __init__(self, directory, **options):
        options = {"kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 4, "seed": 0, **options}
        self.llm = vllm.LLM(str(directory), skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
                            max_model_len=128, **options)  # fmt: skip

    @property
    def model(self):
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def tokens(self):
        how = vllm.SamplingParams(temperature=0, max_tokens=24, detokenize=False, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        return [list(said.outputs[0].token_ids) for said in self.llm.generate(asked, how, use_tqdm=False)]


def own(directory):
    """What transformers says, with gaugekit's loader."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    said = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        said.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
        )
    return said


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


TWO_RANKS = """
import sys, vllm
if __name__ == "__main__":
    llm = vllm.LLM(sys.argv[1], load_format="gaugekit", skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
                   max_model_len=128, max_num_seqs=4, kv_cache_memory_bytes=1 << 26, tensor_parallel_size=2,
                   distributed_executor_backend="mp")
    how = vllm.SamplingParams(temperature=0, max_tokens=24, detokenize=False, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in eval(sys.argv[2])]
    print("SAID", [list(said.outputs[0].token_ids) for said in llm.generate(asked, how, use_tqdm=False)])
"""


def test_two_ranks_cut_what_the_loader_gives(models, tmp_path):
    """In processes of their own, each of which loads the plugin: the engine's and one for each rank."""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    done = subprocess.run(
        [sys.executable, script, models("packed"), str(PROMPTS)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"SAID {own(models('plain'))}" in done.stdout


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
