"""transformers serve answers for every layout as the model does by itself, through our attention where asked."""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import torch

from gaugekit import serving
from gaugekit.hf.attention import interface, paged
from gaugekit.hf.cache import attention
from gaugekit.integrations.transformers import GaugekitConfig
from gaugekit.nn.single_cache import attend_inputs
from serveable import LETTERS, PAGES, own
from single_cache_models import model as wide
from tiny import add_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from serving_load import load, mixed

PROMPTS = ["abc", "the quick brown fox", "z"]
TOKENS = 12


def complete(address, model, prompt, tokens=TOKENS, **more):
    """The text and how many tokens it has, an end among them."""
    body = {"model": str(model), "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        said = json.load(response)
    return said["choices"][0]["text"], said["usage"]["completion_tokens"]


@pytest.fixture
def calls(monkeypatch):
    """The calls of shaped_attention, over the paged cache and without."""
    counts = {"paged": 0, "plain": 0}
    for name, module in (("paged", paged), ("plain", interface)):
        attention = module.shaped_attention

        def counted(*arguments, name=name, attention=attention, **keywords):
            counts[name] += 1
            return attention(*arguments, **keywords)

        monkeypatch.setattr(module, "shaped_attention", counted)
    return counts


@pytest.mark.parametrize("batching", [False, True], ids=["one by one", "continuous"])
@pytest.mark.parametrize("kind", ["plain", "packed", "converted", "sliced", "sas"])
def test_every_layout_answers_as_the_model_does_by_itself(served, kind, batching):
    expected = own(served[kind], PROMPTS, TOKENS)
    assert len(set(expected)) == len(PROMPTS) and all(expected), "the texts would not tell models apart"
    options = dict(continuous_batching=batching, dtype="float64", more=PAGES)
    with serving.running(served[kind], **options) as address:
        assert [complete(address, served[kind], prompt)[0] for prompt in PROMPTS] == expected
        with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:
            assert response.status == 200


@pytest.mark.parametrize("kind", ["plain", "converted", "sas"])
def test_our_attention_is_called_once_a_layer_and_step_over_the_paged_cache(served, calls, kind):
    options = dict(continuous_batching=True, dtype="float64", attn_implementation="gaugekit", more=PAGES)
    with serving.running(served[kind], **options) as address:
        calls.update(paged=0, plain=0)  # the attention was tried before it was given to the model
        _, tokens = complete(address, served[kind], "abcde")
    assert tokens > 2
    assert calls == {
        "paged": 2 * tokens,
        "plain": 0,
    }  # two layers: the prompt, then a step for each token but one


def test_our_attention_is_called_where_requests_run_one_by_one(served, calls):
    with serving.running(served["plain"], dtype="float64", attn_implementation="gaugekit") as address:
        calls.update(paged=0, plain=0)
        _, tokens = complete(address, served["plain"], "abcde")
    assert calls == {"paged": 0, "plain": 2 * tokens}


@pytest.mark.parametrize("kind", ["packed", "sas"])
def test_matrices_stay_packed_in_memory(served, kind):
    options = dict(dtype=torch.bfloat16, quantization_config=GaugekitConfig(packed=True))
    expected = own(served[kind], PROMPTS, TOKENS, **options)
    with serving.running(served[kind], dtype="bfloat16", packed=True) as address:
        assert [complete(address, served[kind], prompt)[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("kind", ["converted", "sliced"])
def test_matrices_of_a_converted_model_are_not_said_to_be_packed(served, kind):
    with pytest.raises(ValueError, match="--packed"), serving.running(served[kind], packed=True):
        pass


@pytest.mark.parametrize("kind", ["converted", "sas"])
def test_a_crowd_of_clients_gets_what_each_would_get_alone(served, kind):
    """64 clients at once, some of which hang up and some of which send nonsense; in float64, so that no ties decide."""
    requests = mixed(100, LETTERS, longest=24, tokens=8)
    with serving.running(served[kind], continuous_batching=True, dtype="float64", more=PAGES) as address:
        result = load(address, str(served[kind]), requests)
        alone, _ = complete(address, served[kind], "abc")
    good = [pair for pair in zip(requests, result.answers, strict=True) if pair[0].kind == "good"]
    expected = own(
        served[kind], [request.prompt for request, _ in good], [request.tokens for request, _ in good]
    )
    for (request, answer), text in zip(good, expected, strict=True):
        assert answer.status == 200 and answer.whole and not answer.error, (request, answer)
        assert answer.text.replace(" ", "") == text.replace(" ", ""), request
    refused = [
        a for r, a in zip(requests, result.answers, strict=True) if r.kind not in ("good", "cancelled")
    ]
    assert len(refused) == 10 and all(answer.status >= 400 for answer in refused)
    assert alone == own(served[kind], ["abc"], TOKENS)[0], "the server lives"


def test_one_cached_tensor_answers_as_keys_and_values_do(tmp_path, monkeypatch):
    """GPT-2, whose layers keep their input: each step attends to the cache, once a layer."""
    made = wide("gpt2", vocab_size=60, n_positions=64)
    made.save_pretrained(tmp_path)
    add_tokenizer(tmp_path, LETTERS)
    expected, times = own(tmp_path, PROMPTS, TOKENS), []

    def counted(*arguments, **keywords):
        times.append(None)
        return attend_inputs(*arguments, **keywords)

    monkeypatch.setattr(attention, "attend_inputs", counted)
    with serving.running(tmp_path, dtype="float64", cache="x") as address:
        texts = [complete(address, tmp_path, prompt)[0] for prompt in PROMPTS]
    assert texts == expected and len(times) >= len(PROMPTS)
