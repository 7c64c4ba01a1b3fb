"""fuse and unfuse: the same function, this instance only, and everything back bit for bit."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit.integrations.transformers  # noqa: E402, F401
from gaugekit.checkpoint.install import RECORD  # noqa: E402
from gaugekit.nn import Concat, GaugeProjection, TriangularProjection  # noqa: E402
from gaugekit.ops.gauge_linear import choice  # noqa: E402
from gaugekit.verbs.fuse import fuse, unfuse  # noqa: E402
from helpers import assert_accurate  # noqa: E402


def bert(**changes):
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
    return scatter(
        transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=32, **changes))
    )


def gpt2():
    sizes = {"vocab_size": 60, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32}
    return scatter(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))


def scatter(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.double().eval()


def classes():
    """What a patch of a class would change (transformers notes on a class whether its attention can be set)."""
    found = {}
    for module in (transformers.models.bert.modeling_bert, transformers.models.gpt2.modeling_gpt2):
        found |= {name: dict(vars(kind)) for name, kind in vars(module).items() if isinstance(kind, type)}
    for kind in found.values():
        kind.pop("_can_set_attn_implementation_cached_value", None)
    return found


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_the_function_stays_and_unfuse_restores(make, attention):
    model = make()
    other = copy.deepcopy(model)
    tokens = torch.randint(0, 60, (2, 11))
    expected = model(tokens).logits
    modules = dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, before = model.config.to_dict(), classes()

    report = fuse(model, attention=attention)
    got = model(tokens).logits
    assert (got - expected).norm() <= 1e-12 * expected.norm()
    assert report["left"] == []
    assert report["attention"] == ("gaugekit" if attention else "sdpa")
    assert report["parameters_before"] - report["parameters_after"] == 2 * (2 * 3 * 64 + 2 * 24)
    kinds = {type(model.get_submodule(one["module"])) for one in report["replaced"]}
    assert kinds == ({GaugeProjection} if make is bert else {Concat})
    assert len(report["replaced"]) == len(kinds) * 2 * (2 if make is bert else 1)
    assert sum(p.numel() for p in model.parameters()) == report["parameters_after"]
    assert classes() == before
    assert torch.equal(other(tokens).logits, expected) and RECORD not in other.__dict__
    assert not any("gaugekit" in name for name in model.state_dict())

    report = unfuse(model)
    assert len(report["restored"]) == (8 if make is bert else 4)
    assert list(model.named_modules()) == list(modules.items())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        n: t.shape for n, t in state.items()
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config and RECORD not in model.__dict__
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_a_fused_model_saves_and_loads(make, tmp_path):
    model = make()
    fuse(model)
    tokens = torch.randint(0, 60, (2, 11))
    model.save_pretrained(tmp_path / "m")
    again, info = type(model).from_pretrained(tmp_path / "m", output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    # Tensors mapped from a file start at other addresses than allocated ones, and BLAS then sums in another order.
    assert_accurate(again(tokens).logits, model(tokens).logits.double(), copy.deepcopy(model)(tokens).logits)
    report = fuse(again)
    assert report["replaced"] == [] and "stored as 'gaugekit' already" in report["left"][0]["reason"]


@pytest.mark.parametrize("make", [bert, gpt2])
def test_turned_heads_compute_train_and_save_the_same(make, tmp_path):
    model = make()
    tokens = torch.randint(0, 60, (2, 11))
    expected, state = model(tokens).logits, {name: x.clone() for name, x in model.state_dict().items()}
    report = fuse(model, rows="triangular")
    got = model(tokens).logits
    assert (got - expected).norm() <= 1e-12 * expected.norm()
    assert report["parameters_before"] - report["parameters_after"] == 2 * (2 * 3 * 28 + 2 * 24)
    forms = [module for module in model.modules() if isinstance(module, GaugeProjection)]
    assert len(forms) == 4 and {type(module) for module in forms} == {TriangularProjection}
    assert {entry["product"] for entry in report["products"]} == {"dense"} and len(report["products"]) == 4
    got.square().sum().backward()
    assert all(
        p.grad.isfinite().all() and p.grad.count_nonzero() for form in forms for p in form.parameters()
    )
    model.save_pretrained(tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m", dtype=torch.float64)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())
    unfuse(model)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_rows_are_checked_before_anything_is_touched():
    model = bert()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="shared_partition, triangular; got 'first'"):
        fuse(model, rows="first")
    for other in ({"gauge": False}, {"packed": True}, {"neutreno": 0.5}):
        with pytest.raises(ValueError, match="rows: expected beside gauge, got 'triangular' without it"):
            fuse(model, rows="triangular", **other)
    assert dict(model.named_modules()) == modules and RECORD not in model.__dict__
    report = fuse(model, rows="shared_partition")
    rows = model.bert.encoder.layer[0].attention.self.key.rows
    assert report["left"] == [] and sorted(rows.flatten().tolist()) == list(range(24))


def test_gradients_reach_the_forms_and_frozen_stays_frozen():
    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    fuse(model)
    model(torch.randint(0, 60, (1, 5))).logits.sum().backward()
    fused = [model.transformer.h[layer].attn.c_attn for layer in range(2)]
    assert all(parameter.grad is None for parameter in fused[0].parameters())
    gradients = [parameter.grad for parameter in fused[1].parameters()]
    assert gradients and all(grad.isfinite().all() and grad.count_nonzero() for grad in gradients)


def test_twice_changes_nothing_more():
    model = bert()
    fuse(model)
    modules = dict(model.named_modules())
    report = fuse(model)
    assert report["replaced"] == [] and "unfuse it first" in report["left"][0]["reason"]
    assert dict(model.named_modules()) == modules
    unfuse(model)
    assert unfuse(model)["restored"] == []
    assert fuse(model)["left"] == []


def test_unfuse_follows_the_model():
    model = bert()
    fuse(model)
    model.float()
    unfuse(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model(torch.randint(0, 60, (1, 5)))


def test_what_cannot_be_replaced_is_left_with_the_reason():
    model = bert()
    key = model.bert.encoder.layer[1].attention.self.key
    key.register_forward_hook(lambda module, args, out: out)
    report = fuse(model)
    assert [one["module"] for one in report["left"]] == ["bert.encoder.layer.1"]
    assert "has hooks" in report["left"][0]["reason"]
    assert model.bert.encoder.layer[1].attention.self.key is key
    assert len(report["replaced"]) == 2

    model = bert()
    adapter = model.bert.encoder.layer[0].attention.self
    adapter.value.lora = torch.nn.Linear(24, 2)
    assert "no plain projection" in fuse(model)["left"][0]["reason"]


def test_an_unknown_family_is_left_alone():
    config = transformers.CodeGenConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
    model = transformers.CodeGenModel(config)
    report = fuse(model, attention=False)
    assert report["replaced"] == [] and report["left"][0]["reason"].endswith("; got 'codegen'")
    assert RECORD not in model.__dict__
    plain = fuse(torch.nn.Linear(2, 2))
    assert len(plain["left"]) == 2 and plain["parameters_after"] == 6
    with pytest.raises(ValueError, match="expected an nn.Module, got str"):
        fuse("model")
    with pytest.raises(ValueError, match="expected an nn.Module, got str"):
        unfuse("model")


@pytest.mark.gpu
@pytest.mark.parametrize("make", [bert, gpt2])
def test_on_a_gpu(make):
    model = make().cuda()
    tokens = torch.randint(0, 60, (2, 11)).cuda()
    expected = model(tokens).logits
    fuse(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert (model(tokens).logits - expected).norm() <= 1e-12 * expected.norm()
    unfuse(model)
    assert torch.equal(model(tokens).logits, expected)


def test_greedy_tokens_stay_equal():
    model = gpt2().float()
    tokens = torch.randint(0, 60, (2, 4))
    arguments = {
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(tokens),
    }
    expected = model.generate(tokens, **arguments)
    fuse(model)
    assert torch.equal(model.generate(tokens, **arguments), expected)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_the_report_says_how_compact_projections_are_multiplied_and_why(make):
    report = fuse(make().float())
    parts = ["attention.self.key", "attention.self.value"] if make is bert else ["c_attn.1", "c_attn.2"]
    assert len(report["products"]) == 4
    assert [entry["module"].endswith(part) for entry, part in zip(report["products"], parts * 2, strict=True)]
    for entry in report["products"]:
        expected = choice.plan(choice.kind(), 24, 3, 8, torch.float32, "cpu")
        assert (entry["product"], entry["reason"]) == expected
        assert entry["product"] in ("kernel", "dense") and entry["reason"] in str(report)
    assert {entry["product"] for entry in fuse(make())["products"]} == {"dense"}  # float64


@pytest.mark.parametrize("product", ["kernel", "dense"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_one_token_and_many_through_both_products(make, product, monkeypatch):
    """float32: by our kernel or with a dense weight, the model computes the same to float32's own noise."""
    monkeypatch.setattr(choice, "plan", lambda *_: (product, ""))
    model = make()
    plain, fused = copy.deepcopy(model).float(), copy.deepcopy(model).float()
    fuse(fused, attention=False)
    with torch.no_grad():
        for count in (9, 1):
            tokens = torch.randint(0, 60, (1, count))
            assert_accurate(fused(tokens).logits, model(tokens).logits, plain(tokens).logits)
