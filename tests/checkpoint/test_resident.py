"""Packing in place: what hangs on layers stays, what must not be packed is left, and everything comes back."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import gaugekit as gk
from gaugekit.checkpoint import resident
from gaugekit.nn import PackedLinear
from gaugekit.nn.packed_layer import PackedLayer
from helpers import assert_accurate


def linear(inputs=128, outputs=128, **options):
    return nn.Linear(inputs, outputs, dtype=torch.bfloat16, **options)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()

    def forward(self, x):
        return self.c(self.b(self.a(x)))


X = torch.linspace(-1, 1, 256).view(2, 128).bfloat16()


def leave(layer):
    """The reason ``layer`` stays plain in a model with another that is packed; nothing about it may change."""
    model = nn.ModuleDict({"layer": layer, "other": linear()})
    before = dict(layer.named_parameters())
    report = gk.fuse(model, packed=True, attention=False)
    assert isinstance(model["other"], PackedLinear) and not isinstance(layer, PackedLayer)
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())
    return next(one["reason"] for one in report["left"] if one["module"].startswith("layer"))


def test_hooks_of_every_kind_run_while_packed_and_after():
    model, calls = Net(), []
    layer = model.b
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    layer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    layer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    layer.bias.register_hook(lambda gradient: calls.append("bias"))
    seen = []
    for change in (lambda: None, lambda: resident.pack(model), lambda: resident.unpack(model)):
        change()
        calls.clear()
        model(X).float().sum().backward()
        model.zero_grad()
        model.load_state_dict(model.state_dict())
        seen.append(sorted(calls))
    assert model.b is layer and type(layer) is nn.Linear
    assert len(seen[0]) == 8 and seen == [seen[0]] * 3


def test_a_hook_that_changes_the_output_still_does():
    model = Net()
    model.c.register_forward_hook(lambda module, arguments, out: out * 0)
    resident.pack(model)
    assert isinstance(model.c, PackedLinear) and not model(X).any()


def test_shared_modules_ties_flags_and_attributes_come_back():
    model = Net()
    model.d = model.a
    model.b.bias = model.a.bias
    model.c.weight = model.b.weight
    model.a.weight.requires_grad_(False)
    model.a.note, model.a.weight.note = "kept", ["kept too"]
    model.a.inner = nn.LayerNorm(4)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name, _ in model.named_parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = gk.fuse(model, packed=True, attention=False)
    assert [one["module"] for one in report["replaced"]] == ["a", "b", "c", "d"] and not report["left"]
    assert model.d is model.a and model.b.packed is model.c.packed and model.a.bias is model.b.bias
    assert model.a.note == "kept" and [name for name, _ in model.named_parameters()] == names
    twin = copy.deepcopy(model)
    assert gk.unfuse(model)["restored"] == gk.unfuse(twin)["restored"] == ["a", "b", "c", "d"]
    for one in (model, twin):
        assert one.d is one.a and one.c.weight is one.b.weight and one.a.bias is one.b.bias
        assert one.a.weight.note == ["kept too"] and "stands_for" not in vars(one.a)
        assert [name for name, _ in one.named_parameters()] == names
        assert [parameter.requires_grad for parameter in one.parameters()] == flags
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    assert all(module is modules[name] for name, module in model.named_modules(remove_duplicate=False))


def test_replaced_forwards_leave_the_layer(monkeypatch):
    layer = linear()
    layer.forward = lambda x: x
    assert "forward was replaced" in leave(layer)
    plain = nn.Embedding.forward
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, ids: plain(self, ids))
    assert leave(nn.Embedding(50, 128, dtype=torch.bfloat16)) == "the forward of Embedding was replaced"


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


def hooked():
    layer = linear()
    layer.weight.register_hook(lambda gradient: None)
    return layer


def with_gradient():
    layer = linear()
    layer.weight.grad = torch.zeros_like(layer.weight)
    return layer


def named():
    layer = linear()
    layer.packed = "mine"
    return layer


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 128, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(128, 128), "torch.float32"),
        (lambda: linear(device="meta"), "meta device"),
        (lambda: parametrizations.weight_norm(linear()), "not a plain linear layer"),
        (lambda: nn.utils.weight_norm(linear()), "no parameter of its own"),
        (lambda: prune.l1_unstructured(linear(), "weight", 0.5), "no parameter of its own"),
        (lambda: Scaled(50, 128, dtype=torch.bfloat16), "it is a Scaled"),
        (lambda: nn.Embedding(50, 128, max_norm=1.0, dtype=torch.bfloat16), "max_norm"),
        (lambda: linear(8, 128), "no less memory"),
        (lambda: linear(1, 1), "no less memory"),
        (lambda: linear(0, 128), "no less memory"),
        (hooked, "hooks for gradients"),
        (with_gradient, "holds a gradient"),
        (named, "'packed'"),
        (Experts, "it is a Experts"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:Initializing zero-element")
def test_what_has_to_stay_plain_is_left_with_the_reason(make, reason):
    assert reason in leave(make())


def float8(layer, dtype=torch.float8_e5m2):
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


class OwnLinear(nn.Linear):
    pass


def with_scale(loose=False):
    layer = float8(linear())
    if loose:
        layer.weight_scale = torch.ones(1)
    else:
        layer.register_buffer("weight_scale", torch.ones(1))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: float8(linear(), torch.float8_e4m3fn), r"float8_e4m3fn: .* 7\.2 to 7\.3 of their 8 bits"),
        (lambda: float8(nn.Embedding(50, 128)), "packed in linear layers only"),
        (lambda: with_scale(loose=True), "'weight_scale' beside"),
        (with_scale, "'weight_scale' beside its torch.float8_e5m2 weight"),
        (lambda: float8(linear(8, 8)), "no less memory"),
        (lambda: float8(OwnLinear(128, 128)), "it is a OwnLinear"),
    ],
)
def test_float8_layers_that_stay_plain(make, reason):
    assert re.search(reason, leave(make()))


def test_float8_e5m2_linear_layers_run_packed_and_come_back():
    """torch does not run them: the packed layer does what one does who casts the weight before each product."""
    model = Net()
    for layer in (model.a, model.b):
        float8(layer)
    cast, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    for layer in (cast.a, cast.b):
        layer.weight = nn.Parameter(layer.weight.bfloat16())
    exact = copy.deepcopy(cast).double()
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(X)
    report = gk.fuse(model, packed=True, attention=False)
    assert len(report["replaced"]) == 3 and not report["left"] and len(report["speed"]) == 2
    assert 0.7 < report["bytes_after"] / report["bytes_before"] < 0.8
    assert_accurate(model(X).detach(), exact(X.double()).detach(), cast(X).detach())
    assert model.a.weight.dtype == torch.float8_e5m2 and model.half().a.bias.dtype == torch.float16
    assert model.a.weight.dtype == torch.float8_e5m2
    gk.unfuse(model.bfloat16())
    assert type(model.a) is nn.Linear
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))


def test_nothing_is_advised_where_all_is_float8_e4m3fn():
    report = gk.fuse(nn.ModuleList([float8(linear(), torch.float8_e4m3fn)]), packed=True, attention=False)
    assert report.notes[0] == "nothing was packed: see the reasons below"


def test_tied_weights_become_one_matrix_or_none():
    model = nn.ModuleDict(
        {"table": Scaled(50, 128, dtype=torch.bfloat16), "head": linear(128, 50), "b": linear()}
    )
    model["head"].weight = model["table"].weight
    report = gk.fuse(model, packed=True, attention=False)
    assert [one["module"] for one in report["replaced"]] == ["b"]
    reasons = {one["module"]: one["reason"] for one in report["left"]}
    assert reasons.keys() == {"table", "head"} and "tied to 'table': it is a Scaled" in reasons["head"]
    assert model["head"].weight is model["table"].weight
    assert report["bytes_after"] < report["bytes_before"]


def test_weights_that_share_memory_stay_plain():
    model = Net()
    model.b.weight = nn.Parameter(model.a.weight.data)
    model.register_buffer("kept", model.c.weight.data[:2])
    report = gk.fuse(model, packed=True, attention=False)
    assert {one["module"] for one in report["left"]} == {"a", "b", "c"} and not report["replaced"]
    assert all("share memory" in one["reason"] for one in report["left"])


def test_the_report_counts_every_byte():
    model = nn.Sequential(linear(), Experts(), nn.LayerNorm(128), nn.BatchNorm1d(4))
    report = gk.fuse(model, packed=True, attention=False)
    plain = sum(t.nbytes for part in list(model)[1:] for t in [*part.parameters(), *part.buffers()])
    assert report["bytes_before"] == 2 * 128 * 129 + plain
    assert report["bytes_after"] == model[0].packed_bytes + 2 * 128 + plain
    assert report["parameters_before"] == report["parameters_after"] == 128 * 129 + 4 * 128 * 128 + 2 * 132
    assert report["plain_in_vectors"] == 128 + 2 * 132
    assert [one["module"] for one in report["left"]] == ["1"]


def test_packing_again_and_a_root_that_is_a_layer():
    layer = linear()
    before = layer.weight
    assert [one["module"] for one in gk.fuse(layer, packed=True)["replaced"]] == [""]
    again = gk.fuse(layer, packed=True, attention=False)
    assert not again["replaced"] and not again["left"] and again["bytes_before"] == again["bytes_after"]
    assert gk.unfuse(layer)["restored"] == [""]
    assert type(layer) is nn.Linear and torch.equal(layer.weight, before)


def test_layers_packed_by_hand_are_unfused():
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    model.b = PackedLinear.from_linear(model.b)
    assert gk.unfuse(model)["restored"] == ["b"]
    assert type(model.b) is nn.Linear and torch.equal(model(X), plain(X))


def test_a_compiled_model_follows():
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    model.b.compile(backend="aot_eager")
    expected = compiled(X)
    resident.pack(model)
    assert torch.equal(compiled(X), model(X)) and model.b._compiled_call_impl is not None
    resident.unpack(model)
    assert torch.equal(compiled(X), expected)
