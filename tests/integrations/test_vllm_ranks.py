"""Two tensor-parallel ranks of a real vLLM (``make test-vllm``): in float32 the tokens of one, whole heads on each."""

import json
import os
import subprocess
import sys

import pytest

from served_by_vllm import PROMPTS, SAS, directories, own  # isort: skip - it says how vLLM starts

import gaugekit as gk

TWO_RANKS = """
import json, sys, vllm

def held(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}

if __name__ == "__main__":
    directory, load_format, prompts = json.loads(sys.argv[1])
    llm = vllm.LLM(directory, load_format=load_format, skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
                   max_model_len=128, max_num_seqs=4, kv_cache_memory_bytes=1 << 26, tensor_parallel_size=2,
                   distributed_executor_backend="mp")
    how = vllm.SamplingParams(temperature=0, max_tokens=24, detokenize=False, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    said = [list(said.outputs[0].token_ids) for said in llm.generate(asked, how, use_tqdm=False)]
    print("ANSWER", json.dumps({"said": said, "held": llm.apply_model(held)}))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return directories(tmp_path_factory.mktemp("models"))


@pytest.fixture
def on_two_ranks(tmp_path):
    """A function: what a directory says on two ranks, and {name: shape} of what each rank holds.

    In processes of their own, each of which loads the plugin: the engine's and one for each rank.
    """
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)

    def run(directory, load_format="auto", fails=False):
        done = subprocess.run(
            [sys.executable, script, json.dumps([str(directory), load_format, PROMPTS])],
            env={
                **os.environ,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            },
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert bool(done.returncode) == fails, done.stdout[-3000:] + done.stderr[-3000:]
        if fails:
            return done.stdout + done.stderr
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
        answer = json.loads(line.removeprefix("ANSWER "))
        return answer["said"], answer["held"]

    return run


def test_packed(models, on_two_ranks):
    """vLLM's own class cuts what the loader gives."""
    said, _ = on_two_ranks(models("packed"), "gaugekit")
    assert said == own(models("plain"))


def test_converted_and_packed(models, tmp_path, on_two_ranks):
    """What a fixed gauge passes through is a slice on each rank: it holds its own head's rows and ``free``."""
    gk.codec.pack(models("converted"), tmp_path / "packed")
    said, held = on_two_ranks(tmp_path / "packed", "gaugekit")
    assert said == own(models("plain"))
    for shapes in held:
        assert shapes["model.layers.0.self_attn.v_proj.free"] == [1, 64, 64]
        assert shapes["model.layers.0.self_attn.v_proj.rows"] == [1, 64]
        assert shapes["model.layers.0.self_attn.o_proj.weight"] == [128, 128]


def test_truncated(models, on_two_ranks):
    said, held = on_two_ranks(models("truncated"))
    assert said == own(models("truncated"))
    for shapes in held:
        assert shapes["model.layers.1.self_attn.q_proj.weight"] == [64, 128]
        assert shapes["model.layers.1.self_attn.k_proj.places"] == [32]


@pytest.mark.parametrize("kind", SAS)
def test_sas(models, on_two_ranks, kind):
    said, held = on_two_ranks(models(kind))
    assert said == own(models(kind))
