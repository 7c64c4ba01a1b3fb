"""verify measures what its definitions say, on live models and on directories."""

import json

import pytest
import torch
from transformers import BertForMaskedLM

import gaugekit.verbs.verify
from gaugekit import samples
from helpers import minilm
from tiny import bert, copy_of, gpt2


def outputs(model, field, dtype):
    """All output rows at unpadded positions, one sequence at a time and so without any padding."""
    model = copy_of(model).to(dtype)
    with torch.no_grad():
        rows = [
            getattr(model(input_ids=torch.tensor([ids])), field)[0]
            for ids in sorted(samples.random_sequences(90, 48, avoid=model.config.pad_token_id), key=len)
        ]
    return torch.cat(rows).double()


@pytest.mark.parametrize("make, field", [(bert, "last_hidden_state"), (gpt2, "logits")])
def test_every_number_follows_its_definition(make, field):
    a = make(max_position_embeddings=48) if make is bert else make()
    b = copy_of(a, 1e-2)
    report = gaugekit.verify(a, b, dtype="bfloat16")
    r, p, y = (
        outputs(m, field, t) for m, t in [(a, torch.float64), (a, torch.bfloat16), (b, torch.bfloat16)]
    )
    # Batching reorders bfloat16 sums: what it changes is itself of the order of the noise, so the noise may move.
    assert report["noise"] == pytest.approx(((p - r).norm() / r.norm()).item(), rel=0.2)
    assert report["relative_error"] == pytest.approx(((y - r).norm() / r.norm()).item(), rel=0.1)
    assert (report["output"], report["rows"], report["dtype"]) == (field, len(r), "bfloat16")
    report = gaugekit.verify(a, b, dtype="fp64", batch_size=7)
    y = outputs(b, field, torch.float64)
    assert report["noise"] == 0.0
    assert report["relative_error"] == pytest.approx(((y - r).norm() / r.norm()).item(), rel=1e-9)
    assert report["max_abs_error"] == pytest.approx((y - r).abs().max().item(), rel=1e-9)
    assert report["min_cosine"] == pytest.approx(torch.cosine_similarity(y, r, dim=-1).min().item(), rel=1e-9)
    assert report["ok"] is False


def test_layers_are_the_hidden_states():
    a = bert()
    b = copy_of(a)
    with torch.no_grad():
        b.encoder.layer[1].output.dense.weight.mul_(1.5)
    layers = gaugekit.verify(a, b, dtype="fp64")["layers"]
    assert [row["layer"] for row in layers] == [0, 1, 2]
    assert [row["relative_error"] == 0 for row in layers] == [True, True, False]


def test_pool_mean_averages_unpadded_tokens_and_scales_to_length_one():
    a, seen = bert(max_position_embeddings=48), []
    b = copy_of(a, 1e-3)
    report = gaugekit.verify(
        a, b, dtype="fp64", pool="mean", progress=lambda done, total: seen.append((done, total))
    )
    sequences = samples.random_sequences(90, 48, avoid=0)
    rows = []
    for model in (a, b):
        model = copy_of(model).double()
        with torch.no_grad():
            means = [model(input_ids=torch.tensor([ids])).last_hidden_state.mean(1)[0] for ids in sequences]
        rows.append(torch.nn.functional.normalize(torch.stack(means), dim=-1))
    assert report["rows"] == len(sequences)
    assert report["max_abs_error"] == pytest.approx((rows[0] - rows[1]).abs().max().item(), rel=1e-9)
    tokens = sum(map(len, sequences))
    assert report["tokens"] == tokens
    assert [total for _, total in seen] == [2 * tokens] * 4 and seen[-1][
        0
    ] == 2 * tokens  # two passes, two batches
    assert seen[1][0] == tokens and 0 < seen[0][0] < tokens < seen[2][0] < 2 * tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_an_exact_rewrite_passes_and_an_inexact_one_fails(dtype):
    a = gpt2()
    exact, inexact = copy_of(a), copy_of(a)
    order = torch.tensor([2, 0, 3, 1]).mul(8).repeat_interleave(8) + torch.arange(8).repeat(
        4
    )  # heads exchanged
    with torch.no_grad():
        for block in exact.transformer.h:
            for third in range(3):
                here = slice(32 * third, 32 * third + 32)
                block.attn.c_attn.weight[:, here] = block.attn.c_attn.weight[:, here][:, order]
            block.attn.c_proj.weight.copy_(block.attn.c_proj.weight[order])
        inexact.transformer.h[0].attn.c_proj.weight.neg_()
    report = gaugekit.verify(a, exact, dtype=dtype)
    assert report["ok"] and report["relative_error"] <= (
        1e-14 if dtype == "float64" else 1.2 * report["noise"]
    )
    assert not gaugekit.verify(a, inexact, dtype=dtype)["ok"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_fails_and_still_reports(value):
    a = bert()
    b = copy_of(a)
    with torch.no_grad():
        b.encoder.layer[1].output.dense.bias[3] = value
    report = gaugekit.verify(a, b)
    assert report["ok"] is False and report["relative_error"] is None and report["min_cosine"] is None
    assert json.loads(report.json())["noise"] == report["noise"] > 0
    assert "not finite" in str(report)
    assert gaugekit.verify(b, a)["ok"] is False


def test_a_live_model_is_left_as_it_was():
    a, b = bert().train(), copy_of(bert())
    before = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    report = gaugekit.verify(a, b, dtype="bf16")
    assert report == gaugekit.verify(a, b, dtype=torch.bfloat16)  # no dropout: the copy is in evaluation mode
    assert all(module.training for module in a.modules()) and not any(
        module.training for module in b.modules()
    )
    assert all(tensor.dtype == before[name].dtype for name, tensor in a.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in a.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in a.parameters())


def test_directories_give_what_live_models_give(tmp_path):
    a, b = gpt2().to(torch.bfloat16), gpt2().to(torch.bfloat16)
    a.save_pretrained(tmp_path / "a")
    b.save_pretrained(tmp_path / "b")
    report = gaugekit.verify(tmp_path / "a", str(tmp_path / "b"))
    assert report["dtype"] == "bfloat16"
    assert report.fields == gaugekit.verify(a, b).fields == gaugekit.verify(tmp_path / "a", b).fields


def test_a_masked_language_model_is_compared_by_its_logits(tmp_path):
    model = bert(BertForMaskedLM)
    model.save_pretrained(tmp_path / "a")
    report = gaugekit.verify(tmp_path / "a", model, pool=None)
    assert report["output"] == "logits" and report["ok"]
    assert gaugekit.verify(tmp_path / "a", model, pool="mean")["rows"] == 64


@minilm
def test_the_real_model_shows_the_known_noise_of_bfloat16(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(samples.sentences(24)), encoding="utf-8")
    report = gaugekit.verify(samples.minilm(), samples.minilm(), text=text, dtype="bf16", pool="mean")
    assert report["ok"] and report["rows"] == 24 and report["max_abs_error"] == 0
    # For unit vectors 1 − cos = ‖difference‖²/2; 500 sentences of this text measured 4.06e-5.
    assert report["noise"] ** 2 / 2 == pytest.approx(4.06e-5, rel=0.25)
