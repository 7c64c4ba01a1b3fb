"""Two tensor-parallel ranks of a real vLLM (``make test-vllm``): in float32 the tokens of one, whole heads on each."""

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from served_by_vllm import PROMPTS, SAS, directories, own  # isort: skip - it says how vLLM starts

import torch

import gaugekit as gk
from gaugekit.integrations.vllm.converted import GaugekitForCausalLM
from gaugekit.integrations.vllm.quantization import Forms
from gaugekit.integrations.vllm.ranks import Ranks, cut_forms
from gaugekit.nn.concat import Concat
from gaugekit.nn.gauge_projection import GaugeProjection
from gaugekit.nn.low_rank_projection import LowRankProjection
from gaugekit.nn.triangular_projection import TriangularProjection

HELD = """
def held(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
"""
TWO_RANKS = """
import json, sys, vllm
from held import held  # in a file of its own, which every process can import

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
    (tmp_path / "held.py").write_text(HELD)

    def run(directory, load_format="auto", fails=False):
        done = subprocess.run(
            [sys.executable, script, json.dumps([str(directory), load_format, PROMPTS])],
            env={
                **os.environ,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of ``held``
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=840,
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


def test_truncated(models, on_two_ranks):
    said, held = on_two_ranks(models("truncated"))
    assert said == own(models("truncated"))
    for shapes in held:
        assert shapes["model.layers.1.self_attn.q_proj.weight"] == [64, 128]
        assert shapes["model.layers.1.self_attn.k_proj.places"] == [32]


@pytest.mark.parametrize("kind", SAS)
def test_sas(models, on_two_ranks, kind):
    """Gains and what stands beside an identity by heads; vLLM keeps its own layers' weights in a layout of its own."""
    said, held = on_two_ranks(models(kind))
    assert said == own(models(kind))
    heads = SAS[kind]["num_attention_heads"] // 2
    for shapes in held:
        gains = [shape for name, shape in shapes.items() if name.endswith("attention.alpha")]
        assert gains == ([] if kind == "standard blocks" else [[heads]] * 2)
        if kind in ("sas", "sas with a window"):
            assert shapes["model.layers.0.attention.value.weight"] == [64, 128]


def scattered():
    """A projection whose heads have ranks and places of their own."""
    form = LowRankProjection(12, 5, [1, 3, 2, 4], leading=False)
    form.places.copy_(torch.tensor([2, 5, 7, 9, 10, 14, 16, 17, 18, 19]))
    return form


def passing(form):
    """A gauge projection that passes other inputs through in each head."""
    form.rows.copy_(torch.stack([torch.randperm(12)[:3].sort().values for _ in range(4)]))
    return form


FORMS = {
    "gauge, padded": lambda: passing(GaugeProjection(12, 4, 3, bias=True, padded=5)),
    "triangular": lambda: passing(TriangularProjection(12, 4, 3)),
    "scattered ranks": scattered,
    "even ranks": lambda: LowRankProjection(12, 5, [2, 2, 2, 2], bias=False),
}


class Model(torch.nn.Module):
    """A model as transformers has them, with one layer and a plan for it."""

    def __init__(self, layer, style="colwise"):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"v_proj": layer})])
        self.tp_plan = {"layers.*.v_proj": style} if style else {}


@pytest.mark.parametrize("name", FORMS)
def test_the_outputs_of_the_ranks_are_those_of_the_whole(name):
    form = FORMS[name]().double()
    for parameter in form.parameters():
        torch.nn.init.normal_(parameter)
    x, parts = torch.randn(2, 7, 12, dtype=torch.float64), []
    for number in range(2):
        model = Model(copy.deepcopy(form).to("meta"))
        cut_forms(model, Ranks(2, number), torch.device("cpu"))
        part = model.layers[0].v_proj
        assert part.state_dict().keys() == form.state_dict().keys()
        for tensor, whole in form.state_dict().items():
            getattr(part, tensor).weight_loader(getattr(part, tensor), whole)
        parts.append(part(x))
    torch.testing.assert_close(torch.cat(parts, dim=-1), form(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer, style, reason",
    [
        (
            GaugeProjection(12, 3, 4),
            "colwise",
            "heads: expected a multiple of the 2 ranks that share them, got 3",
        ),
        (GaugeProjection(12, 4, 3), "rowwise", r"a GaugeProjection at layers\.0\.v_proj"),
        (GaugeProjection(12, 4, 3), None, "no tensor parallel plan for"),
        (Concat([GaugeProjection(12, 4, 3), torch.nn.Linear(12, 12)]), "colwise", "a Concat at"),
    ],
)
def test_refused(layer, style, reason):
    with pytest.raises(ValueError, match=reason):
        cut_forms(Model(layer, style), Ranks(2, 0), torch.device("cpu"))


def test_a_weight_of_another_shape_is_an_error():
    model = Model(GaugeProjection(12, 4, 3))
    cut_forms(model, Ranks(2, 1), torch.device("cpu"))
    free = model.layers[0].v_proj.free
    with pytest.raises(ValueError, match=r"expected a weight of \(4, 9, 3\), got \(2, 9, 3\)"):
        free.weight_loader(free, torch.zeros(2, 9, 3))


@pytest.mark.parametrize(
    "forms, tensor, pipeline, reason",
    [
        (
            Forms({}, {"width": 8}),
            2,
            1,
            "tensor_parallel_size: expected 1 for a model whose stream is sliced",
        ),
        (Forms({}, None), 1, 2, "pipeline_parallel_size: expected 1 for a model that gaugekit converted"),
    ],
)
def test_ranks_that_no_model_of_ours_takes(forms, tensor, pipeline, reason):
    ranks = SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    with pytest.raises(ValueError, match=reason):
        GaugekitForCausalLM(vllm_config=SimpleNamespace(quant_config=forms, parallel_config=ranks))
