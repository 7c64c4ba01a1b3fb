"""A real language model through every verb: rotary positions, grouped heads, tied embeddings, trained weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gaugekit as gk
import gaugekit.integrations.transformers
from gaugekit import samples
from gaugekit.checkpoint import Checkpoint
from gaugekit.integrations.packing import load_packed
from gaugekit.ops.packed_linear import choice
from helpers import smollm2

pytestmark = [smollm2, pytest.mark.slow]
SIZE, REMOVED = 134_515_008, 368_640  # 30 layers · 3 key/value heads · 64²
QUESTION = "The capital of France is"


@pytest.fixture(scope="module")
def source():
    return samples.smollm2()


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("smollm2") / "fixed"
    report = gk.convert(source, target, [gk.symmetry.GaugeFix()])
    assert report["parameters_before"] == SIZE and report["parameters_after"] == SIZE - REMOVED
    assert report["invariance_error"] < 1e-13
    return target


def answer(model, path, tokens=4):
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(QUESTION, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_the_sample_is_a_plain_directory_of_bfloat16(source):
    assert samples.smollm2() == source  # the second call finds it
    model = AutoModelForCausalLM.from_pretrained(source)
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == SIZE
    assert getattr(model.config, "quantization_config", None) is None
    assert answer(model, source).startswith(" Paris")


def test_inspect_sees_full_ranks(source):
    report = gk.inspect(source, text=samples.sentences(4))
    assert report["parameters"] == SIZE and report["removable"] == REMOVED
    # 30 layers: 3 · 64 rotary scales, two gains of 576 that nothing shares, 1,536 hidden units. The head is tied: the
    # stream turns only among channels whose gains in the last norm were rounded to the same number.
    _, sizes = Checkpoint(source).read("model.norm.weight").unique(return_counts=True)
    equal = int((sizes * (sizes - 1) // 2).sum())
    assert report["unobservable"]["total"] == REMOVED + 30 * (3 * 64 + 2 * 576 + 1536) + equal
    assert report["unobservable"]["value_output"] == REMOVED
    ranks = [rank for row in report["layers"] for rank in row["ranks"]]
    # A few trained heads have singular values that bfloat16 cannot tell from its rounding; the least rank is 38.
    assert len(ranks) == 30 * 9 and min(ranks) == 38 and sum(rank == 64 for rank in ranks) > 0.9 * len(ranks)


def test_the_converted_model_answers_and_verify_says_what_bfloat16_lost(source, converted):
    """Float64 noise before rounding, and close to 1.2 times bfloat16's own noise after it, on text so short."""
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert answer(model, source).startswith(" Paris")
    report = gk.verify(source, converted, text=samples.sentences(16))  # the default reads four times as much
    assert report["dtype"] == "bfloat16" and report["findings"] == []
    # Where the processor multiplies bfloat16 by itself, torch rounds otherwise, and the model's own noise is larger.
    expected = 1.04 if choice.kind(torch.bfloat16) in ("pairs", "16-bit") else 1.18
    assert report["relative_error"] / report["noise"] == pytest.approx(expected, abs=0.05)
    assert report["ok"] == (report["relative_error"] <= 1.2 * report["noise"])


def test_packing_loses_nothing_and_the_packed_model_answers_alike(source, tmp_path):
    report = gk.codec.pack(source, tmp_path / "packed")
    assert report["ratio"] < 0.75
    plain = AutoModelForCausalLM.from_pretrained(source)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    expected = answer(plain, source)
    resident = load_packed(tmp_path / "packed")
    assert answer(resident, source) == expected
    fused = gk.fuse(plain, packed=True)
    assert fused["bytes_after"] < 0.75 * fused["bytes_before"]
    assert answer(plain, source) == expected
    gk.unfuse(plain)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_a_fused_model_answers_alike(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = answer(model, source)
    report = gk.fuse(model)
    assert report["left"] == [] and report["parameters_before"] - report["parameters_after"] == REMOVED
    assert answer(model, source) == expected
