"""Small models in every layout that vLLM is given, what each says in transformers, and a vLLM that answers.

Where there is no vLLM, importing this skips the tests that do so.
"""

import os

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
                  VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_HOST_IP="127.0.0.1")  # fmt: skip

import pytest

pytest.importorskip("vllm", reason="make test-vllm installs vLLM")

import torch
import transformers
import vllm

import gaugekit as gk
import gaugekit.integrations.transformers
from gaugekit.integrations.sas import SASConfig, SASForCausalLM
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


def directories(folder):
    """A function that gives the directory of a kind, written into ``folder`` where it does not stand yet."""
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
