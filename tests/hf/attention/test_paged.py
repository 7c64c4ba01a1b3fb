"""Continuous batching through our attention: over the paged cache each request gets what it gets by itself."""

import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
import gaugekit.integrations.transformers  # noqa: E402
from gaugekit.hf.attention import paged  # noqa: E402
from gaugekit.integrations.sas import SASConfig, SASForCausalLM  # noqa: E402
from helpers import assert_accurate  # noqa: E402
from sliceable import build  # noqa: E402

PROMPTS = [[5, 6, 7], [*range(4, 34)], [9], [4, 8, 8, 8, 30]]
NEW = 8


def batched(model, tokens=16):
    """What each of PROMPTS is followed by, all together, at most ``tokens`` in a step: long prompts come in chunks."""
    outputs = model.generate_batch(
        PROMPTS,
        generation_config=transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=tokens
        ),
    )
    assert not [output.error for output in outputs.values() if output.error]
    return [output.generated_tokens for output in outputs.values()]


def alone(model):
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    said = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        said.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        )
    return said


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "phi"])
def test_requests_together_get_what_each_gets_alone(name):
    model = build(name)
    expected = alone(model)
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    model.set_attn_implementation("gaugekit")
    assert batched(model) == expected
    assert model.config._attn_implementation == "gaugekit"


def test_layers_with_a_window_and_layers_without():
    model = build("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1)
    expected = alone(model)
    model.set_attn_implementation("gaugekit")
    assert batched(model) == expected


def test_neutreno_takes_the_first_values_of_each_request():
    model = build("llama")
    gk.fuse(model, neutreno=0.4)
    expected = alone(model)
    assert batched(model) == expected
    gk.unfuse(model)
    assert alone(model) != expected, "the term would not be missed"


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(rope=True, num_key_value_heads=2),
        dict(block="sas_p", norm="none", sliding_window=4),
        dict(key_width=12, values=True, outputs=True),
        dict(block="skipless", rope=True),
    ],
    ids=["sas", "groups", "window", "wide keys", "skipless"],
)
def test_sas_models_keep_keys_and_inputs_in_the_pages(options):
    config = SASConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, pad_token_id=0,
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SASForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.dim() == 1 else 0.0, 0.4)
    expected = alone(model)
    assert len({tuple(tokens) for tokens in expected}) > 2
    assert batched(model) == expected


def operands(dtype=torch.float64, heads=4, groups=2):
    """Five requests: a prompt, two steps of close lengths, one far longer, a chunk; and two rows of padding."""
    queries, keys = [0, 6, 7, 8, 9, 12], [0, 6, 15, 27, 127, 137]
    generator = torch.Generator().manual_seed(0)
    draw = [(heads, 14, 8), (groups, 137, 8), (groups, 137, 8), (groups, 14, 8)]
    return (*(torch.randn(1, *shape, dtype=dtype, generator=generator) for shape in draw), queries, keys)


TERMS = {
    "plain": {},
    "window": {"window": 5},
    "shaped": {"alpha": 0.3, "beta": 1.2, "gamma": 0.7},
    "lam": {"lam": 0.4},
}


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_each_request_is_a_call_of_shaped_attention(terms):
    q, k, v, v0, queries, keys = operands()
    more = {"v0": v0} if "lam" in terms else {}
    out = paged.paged_attention(q, k, v, queries, keys, scale=0.3, **terms, **more)
    for (a, b), (c, d) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
        more = {"v0": v0[:, :, a:b]} if "lam" in terms else {}
        part = (q[:, :, a:b], k[:, :, c:d], v[:, :, c:d])
        expected = gk.shaped_attention(*part, causal=True, scale=0.3, **terms, **more)
        torch.testing.assert_close(out[:, :, a:b], expected, rtol=0, atol=1e-14)
    assert not out[:, :, queries[-1] :].any(), "rows of no request"


def test_lone_queries_of_about_one_length_are_one_call(monkeypatch):
    q, k, v, _, queries, keys = operands()
    calls = []
    own = paged.shaped_attention
    monkeypatch.setattr(
        paged, "shaped_attention", lambda *a, **b: calls.append(a[0].shape[0]) or own(*a, **b)
    )
    paged.paged_attention(q, k, v, queries, keys)
    assert sorted(calls) == [
        1,
        1,
        1,
        2,
    ]  # 9 and 12 keys together; 100 keys, the prompt and the chunk by themselves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_torchs_attention(dtype):
    q, k, v, _, queries, keys = operands()
    low = [x.to(dtype) for x in (q, k, v)]
    q, k, v = (x.double() for x in low)
    reference = paged.paged_attention(q, k, v, queries, keys)
    mask = torch.full((14, 137), False)
    for (a, b), (c, d) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
        mask[a:b, c:d] = torch.arange(d - c) <= torch.arange(d - c - b + a, d - c)[:, None]
    mask[12:, 0] = True
    plain = torch.nn.functional.scaled_dot_product_attention(*low, attn_mask=mask, enable_gqa=True)
    rows = slice(0, 12)
    ours = paged.paged_attention(*low, queries, keys)
    assert_accurate(ours[:, :, rows], reference[:, :, rows], plain[:, :, rows])


def test_what_is_not_ours_is_left_to_transformers():
    """An attention that continuous batching cannot use is still refused."""
    from transformers import AttentionInterface

    AttentionInterface.register("nobodys", AttentionInterface()["sdpa"])
    model = build("llama")
    model.set_attn_implementation("nobodys")
    with pytest.raises(ValueError, match="nobodys"):
        batched(model)
