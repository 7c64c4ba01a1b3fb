"""Adapters on parameters (PEFT's target_parameters): refused around packed layers, and where they are, layers stay
plain."""

import copy

import pytest
import torch
from torch import nn

import gaugekit as gk
from gaugekit.nn import PackedExperts, PackedLinear

transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).view(2, 12)
EXPERTS = "model.layers.0.mlp.experts"
UNCLEAR = "needs plain weights, and those of this {} are packed: gaugekit.unfuse"


def mixture():
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


class ParamWrapper(nn.Module):
    """What PEFT puts around a module to whose parameter it adds a low-rank product while it runs."""

    def __init__(self, base_layer, parameter_name):
        super().__init__()
        self.base_layer = base_layer
        self.parameter_name = parameter_name


def test_wrapping_a_packed_layer_is_refused_and_changes_nothing():
    model = mixture()
    plain = copy.deepcopy(model)
    gk.fuse(model, packed=True, attention=False)
    with pytest.raises(RuntimeError, match=UNCLEAR.format("MixtralExperts")):
        ParamWrapper(model.get_submodule(EXPERTS), "down_proj")
    with pytest.raises(RuntimeError, match=UNCLEAR.format("Linear")):
        ParamWrapper(model.lm_head, "weight")
    assert isinstance(model.get_submodule(EXPERTS), PackedExperts)
    gk.unfuse(model)
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in model.state_dict().items())
    ParamWrapper(model.get_submodule(EXPERTS), "down_proj")


def test_other_containers_take_packed_layers():
    layer = PackedLinear.from_linear(nn.Linear(128, 128).bfloat16())
    assert nn.Sequential(layer)[0] is layer
    assert nn.ModuleDict({"base_layer": layer})["base_layer"] is layer


class TestPEFT:
    """The same with PEFT itself, where it is installed."""

    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    @pytest.fixture
    def config(self, peft):
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return peft.LoraConfig(target_modules=[], target_parameters=targets, r=4, init_lora_weights=False)

    def test_added_to_packed_experts_it_is_refused(self, peft, config):
        model = mixture()
        gk.fuse(model, packed=True, attention=False)
        with pytest.raises(RuntimeError, match=UNCLEAR.format("MixtralExperts")):
            peft.get_peft_model(model, config)
        gk.unfuse(model)
        loss = peft.get_peft_model(model, config)(IDS, labels=IDS).loss
        loss.backward()
        assert loss.isfinite()

    def test_added_before_packing_it_trains_beside_packed_layers(self, peft, config):
        model = mixture()
        model.requires_grad_(False)
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            expected = adapted(IDS).logits
        report = gk.fuse(adapted, packed=True, attention=False)
        left = [one["reason"] for one in report["left"] if "target_parameters" in one["reason"]]
        assert len(left) == 2 and any(isinstance(m, PackedLinear) for m in adapted.modules())
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None for p in trained)
        with torch.no_grad():
            assert (adapted(IDS).logits - expected).float().norm() <= 0.02 * expected.float().norm()
