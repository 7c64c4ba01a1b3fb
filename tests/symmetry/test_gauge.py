"""Gauge fixing of live models: exact, the entries that went are exactly 0 or 1, and the counts are the formula's."""

import re

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
from gaugekit import symmetry  # noqa: E402
from gaugekit.models import Live  # noqa: E402
from helpers import minilm  # noqa: E402


def bert():
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=32
    )
    return scatter(transformers.BertForMaskedLM(config))


def gpt2():
    return scatter(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_embd=24, n_head=3, n_layer=2, n_positions=32)
        )
    )


def scatter(model):
    """Random weights everywhere, biases too: fresh models have zero biases, which would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.double().eval()


@pytest.mark.parametrize("rows", ["balanced", "max_volume", "shared_partition"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_fix_is_exact_in_float64(make, rows):
    model = make()
    kinds = [type(module) for module in model.modules()]
    tokens = torch.randint(0, 60, (2, 11))
    expected = model(tokens).logits
    report = symmetry.fix(model, rows=rows)
    got = model(tokens).logits
    assert (got - expected).norm() <= 1e-12 * expected.norm()
    assert [type(module) for module in model.modules()] == kinds
    per_layer = {"value_output": 3 * 64, "query_key": 3 * 64, "key_bias": 24, "value_bias": 24}
    assert report["removed"] == {**{name: 2 * size for name, size in per_layer.items()}, "total": 2 * 432}
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    live = Live(model)
    for layer, entry in enumerate(report["layers"]):
        view = live.attention(layer)
        assert 0 < entry["invariance_error"] < 1e-13
        assert {group: size for group, size in symmetry.count(view).items() if size} == per_layer
        assert view.k.bias.count_nonzero() == 0 and view.v.bias.count_nonzero() == 0
        for part, chosen in ((view.k, entry["key_rows"]), (view.v, entry["value_rows"])):
            for head, inputs in enumerate(chosen):
                assert torch.equal(part.weight[head, inputs], torch.eye(8, dtype=torch.float64))
        if rows == "shared_partition":
            assert sorted(index for head in entry["key_rows"] for index in head) == list(range(24))
    again = symmetry.fix(model, rows=rows)
    assert again["removed"] == report["removed"]


def test_fix_keeps_gradients_flowing_and_parameters_the_same_objects():
    """The loss is the same function of what lies outside attention, so its gradient there is the same, too."""
    model, tokens = gpt2(), torch.randint(0, 60, (2, 9))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        symmetry.fix(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    outside = [name for name in before if ".attn." not in name]
    assert len(outside) > 10 and all(gradient.count_nonzero() for gradient in gradients[1].values())
    for name in outside:
        assert (gradients[1][name] - gradients[0][name]).norm() <= 1e-10 * gradients[0][name].norm(), name


def test_bad_input():
    with pytest.raises(ValueError, match="balanced, max_volume, shared_partition, triangular; got 'first'"):
        symmetry.fix(bert(), rows="first")
    with pytest.raises(ValueError, match="transformers model"):
        symmetry.fix(torch.nn.Linear(2, 2))
    codegen = transformers.CodeGenConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
    with pytest.raises(ValueError, match="expected one of .*bert, .*; got 'codegen'"):
        symmetry.fix(transformers.CodeGenModel(codegen))


@minilm
def test_the_counts_of_a_real_model():
    from gaugekit import samples

    plan = symmetry.GaugeFix().plan(transformers.AutoConfig.from_pretrained(samples.minilm()).to_dict())
    assert plan == {
        "value_output": 73_728,
        "query_key": 73_728,
        "key_bias": 2_304,
        "value_bias": 2_304,
        "total": 152_064,
    }


@pytest.mark.parametrize("shared", ["keys and values", "two layers"])
def test_numbers_that_two_parts_share_are_not_fixed_twice(shared):
    """Both would change where one is written: the function would be lost without a word."""
    model = bert()
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    if shared == "keys and values":
        first.value.weight = first.key.weight
    else:
        second.key = first.key
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"expected '.*\.key\.weight' to share its numbers with no other, got .*"
    ):
        symmetry.fix(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_that_share_all_their_numbers_are_fixed_as_one():
    model = bert()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        symmetry.fix(model)
        assert (model(ids).logits - before).norm() <= 1e-12 * before.norm()


def test_a_compact_model_is_refused_with_its_numbers_untouched():
    """Without biases a compact projection still has a weight to read, which nothing can be written into."""
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=32
    )
    model = scatter(transformers.LlamaForCausalLM(config))
    gk.fuse(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for verb in (gk.inspect, symmetry.fix):
        with pytest.raises(ValueError, match="v_proj.weight, got none .already compact"):
            verb(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_numbers_that_do_not_fit_the_dtype_leave_a_model_as_it_was():
    """In float16 a block and what takes it up may each fit and their product not: infinities would follow."""
    model = bert()
    with torch.no_grad():
        attention = model.bert.encoder.layer[1].attention
        attention.self.value.weight.mul_(3e3)
        attention.output.dense.weight.mul_(1e2)
    model.half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = r"encoder.layer.1.attention.output.dense.weight holds numbers too large for torch.float16"
    report = gk.fuse(model)
    assert [entry["module"] for entry in report["left"]] == ["bert.encoder.layer.1"]
    assert re.search(message, report["left"][0]["reason"]) and len(report["replaced"]) == 2
    gk.unfuse(model)
    with pytest.raises(ValueError, match=message):
        symmetry.fix(model)
    second = {name: tensor for name, tensor in model.state_dict().items() if "layer.1." in name}
    assert second and all(torch.equal(tensor, before[name]) for name, tensor in second.items())
