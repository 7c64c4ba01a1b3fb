"""Packed layers: the numbers of plain ones, through saving, moving, copying and training of what is around them."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import gaugekit as gk
from gaugekit.checkpoint import resident
from gaugekit.nn import PackedEmbedding, PackedLinear, forms
from gaugekit.nn.packed_matrix import PARTS, PackedMatrix
from helpers import assert_accurate

DTYPES = [torch.bfloat16, torch.float16]


def linear(inputs=130, outputs=9, dtype=torch.bfloat16, bias=True):
    return nn.Linear(inputs, outputs, bias, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_there_and_back(dtype, bias):
    plain = linear(dtype=dtype, bias=bias)
    packed = PackedLinear.from_linear(plain)
    back = packed.to_linear()
    assert type(back) is nn.Linear and (back.in_features, back.out_features) == (130, 9)
    assert torch.equal(back.weight, plain.weight) and torch.equal(packed.weight, plain.weight)
    assert (back.bias is None) == (not bias) and (not bias or torch.equal(back.bias, plain.bias))
    x = torch.randn(40, 130).to(dtype)
    exact = nn.functional.linear(x.double(), plain.weight.double(), None if not bias else plain.bias.double())
    assert_accurate(packed(x), exact, plain(x))
    assert packed(x.float()).dtype == torch.float32
    assert packed.packed_bytes == packed.packed.value.bytes


def test_bytes():
    packed = PackedLinear.from_linear(nn.Linear(1024, 256).bfloat16())
    assert packed.packed_bytes == gk.pack_weight(packed.weight).bytes
    assert packed.packed_bytes < 0.75 * 2 * 1024 * 256


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype):
    plain = nn.Embedding(50, 70, padding_idx=3, dtype=dtype)
    packed = PackedEmbedding.from_embedding(plain)
    for ids in (torch.randint(0, 50, (2, 7)), torch.tensor(4), torch.zeros(0, 3, dtype=torch.int64)):
        assert torch.equal(packed(ids), plain(ids))
    assert torch.equal(packed(torch.tensor([1, 2], dtype=torch.int32)), plain(torch.tensor([1, 2])))
    back = packed.to_embedding()
    assert torch.equal(back.weight, plain.weight) and back.padding_idx == 3
    with pytest.raises((RuntimeError, IndexError)):
        packed(torch.tensor([50]))


def test_embedding_with_max_norm_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        PackedEmbedding.from_embedding(nn.Embedding(5, 8, max_norm=1.0).bfloat16())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 128)
        self.inner = nn.Linear(128, 128)
        self.head = nn.Linear(128, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.bfloat16()

    def forward(self, ids):
        return self.head(self.inner(self.embedding(ids)))


IDS = torch.arange(40).view(2, 20)


def test_tied_layers_share_one_matrix_and_come_back_tied():
    model = Tied()
    expected, exact = model(IDS).detach(), copy.deepcopy(model).double()(IDS).detach()
    plain_bytes = sum(p.nbytes for p in model.parameters())
    done = resident.pack(model)
    assert set(done.packed) == {"embedding", "inner", "head"} and not done.left
    assert model.head.packed is model.embedding.packed
    assert done.bytes_before == plain_bytes
    assert (
        done.bytes_after == model.embedding.packed_bytes + model.inner.packed_bytes + model.inner.bias.nbytes
    )
    assert_accurate(model(IDS).detach(), exact, expected)
    model.to("meta")
    assert model.head.packed.raw.is_meta and model.head.packed is model.embedding.packed
    model = Tied()
    resident.pack(model)
    assert resident.unpack(model) == ["embedding", "inner", "head"]
    assert model.head.weight is model.embedding.weight and type(model.inner) is nn.Linear


def test_state_dict_is_the_plain_model_s():
    plain, packed, other = Tied(), Tied(), Tied()
    for model in (packed, other):
        resident.pack(model)
    packed.load_state_dict(plain.state_dict())
    assert torch.equal(packed.inner.weight, plain.inner.weight)
    assert packed.head.packed is packed.embedding.packed
    buffer = io.BytesIO()
    torch.save(packed.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert state.keys() == plain.state_dict().keys()
    assert all(type(state[name]) is torch.Tensor for name in state)
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    Tied().load_state_dict(packed.state_dict())
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(IDS), packed(IDS)) and other.head.packed is other.embedding.packed
    with pytest.raises(RuntimeError, match=r"Missing key.*inner.weight"):
        other.load_state_dict({name: state[name] for name in state if name != "inner.weight"})
    with pytest.raises(RuntimeError, match=r"inner.weight: expected \[128, 128\], got \[128\]"):
        other.load_state_dict(state | {"inner.weight": state["inner.bias"]})


def parts(layer):
    return {f"packed.{name}": getattr(layer.packed, name).clone() for name in PARTS} | {
        "bias": layer.bias.detach()
    }


def test_packed_parts_load_and_damaged_ones_are_refused():
    model, other = PackedLinear.from_linear(linear()), PackedLinear.from_linear(linear())
    state = parts(other)
    model.load_state_dict(state)
    assert torch.equal(model.weight, other.weight)
    state["packed.raw"].zero_()
    assert torch.equal(model.weight, other.weight), "loading copies"
    with pytest.raises(ValueError, match="packed.offsets"):
        model.load_state_dict(parts(other) | {"packed.offsets": state["packed.offsets"] + 1})
    with pytest.raises(RuntimeError, match="packed.raw"):
        model.load_state_dict({name: part for name, part in state.items() if name != "packed.raw"})
    with pytest.raises(
        ValueError, match=r"expected torch.bfloat16 \[9, 130\], got torch.bfloat16 \[8, 130\]"
    ):
        model.load_state_dict(parts(PackedLinear.from_linear(linear(outputs=8))) | {"bias": state["bias"]})


def test_forms():
    packed = PackedLinear.from_linear(linear())
    made = forms.build(
        {"form": "packed_linear", "arguments": {"inputs": 130, "outputs": 9}}, dtype=torch.bfloat16
    )
    made.load_state_dict(packed.state_dict())
    x = torch.randn(3, 130).bfloat16()
    assert torch.equal(made(x), packed(x))
    made = forms.build({"form": "packed_linear", "arguments": {"inputs": 130, "outputs": 9}}, device="meta")
    made.load_state_dict({name: tensor.clone() for name, tensor in packed.state_dict().items()}, assign=True)
    assert made.packed is not None and torch.equal(made(x), packed(x))
    table = PackedEmbedding.from_embedding(nn.Embedding(5, 70).half())
    arguments = {"count": 5, "width": 70, "weights": "float16"}
    made = forms.build({"form": "packed_embedding", "arguments": arguments})
    made.load_state_dict(table.state_dict())
    assert torch.equal(made.weight, table.weight)


def test_casts_leave_the_weight_alone():
    packed = PackedLinear.from_linear(linear()).float()
    assert packed.bias.dtype == torch.float32 and packed.packed.value.dtype == torch.bfloat16
    assert packed(torch.randn(2, 130)).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("under", DTYPES)
def test_autocast_gives_the_dtypes_of_a_plain_layer(dtype, under):
    plain = linear(dtype=dtype)
    packed = PackedLinear.from_linear(plain)
    for kind in (torch.float32, dtype):
        x = torch.randn(3, 130).to(kind).requires_grad_()
        with torch.autocast("cpu", dtype=under):
            y, reference = packed(x), plain(x)
        assert y.dtype == reference.dtype == under
        exact = nn.functional.linear(x.detach().double(), plain.weight.double(), plain.bias.double())
        assert_accurate(y.detach(), exact, reference.detach())
        y.sum().backward()
        assert x.grad.dtype == kind
    x = torch.randn(3, 130, dtype=torch.float64)
    with torch.autocast("cpu", dtype=under):
        assert packed(x).dtype == torch.float64  # autocast leaves float64 alone


def test_pickles_and_copies_are_packed_and_tied():
    model = Tied()
    resident.pack(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.head.packed is twin.embedding.packed is not model.head.packed
        assert torch.equal(twin(IDS), model(IDS))
        twin.inner.weight.data = torch.zeros(128, 128, dtype=torch.bfloat16)
        assert not torch.equal(twin.inner.weight, model.inner.weight)


def test_adapter_on_a_frozen_packed_layer_learns():
    packed, down = PackedLinear.from_linear(linear()), nn.Linear(130, 130, dtype=torch.bfloat16)
    packed(down(torch.randn(4, 130).bfloat16())).sum().backward()
    assert down.weight.grad.abs().sum() > 0 and packed.bias.grad is not None
    assert [name for name, p in packed.named_parameters() if p.requires_grad] == ["bias"]


def test_what_a_weight_is_like_is_known_without_decoding(monkeypatch):
    packed = PackedLinear.from_linear(linear())
    monkeypatch.setattr(PackedMatrix, "unpack", lambda self: pytest.fail("decoded"))
    weight = packed.weight
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.bfloat16, (9, 130), "cpu")
    assert weight.is_floating_point() and weight.numel() == 9 * 130 and isinstance(weight, nn.Parameter)
    assert weight.detach().dtype == weight.data.dtype == torch.bfloat16
    packed(torch.randn(2, 130).bfloat16())


WRITES = {
    "add_": lambda weight: weight.add_(1),
    "copy_": lambda weight: weight.copy_(torch.ones_like(weight)),
    "init": nn.init.ones_,
    "an entry": lambda weight: weight.__setitem__((0, 0), 1.0),
    "entries": lambda weight: weight.__setitem__(torch.tensor([0]), 1.0),
    "a row": lambda weight: weight[0].fill_(1),
    "transposed": lambda weight: weight.T.add_(1),
    "flat": lambda weight: weight.view(-1)[0].zero_(),
    "out": lambda weight: torch.add(torch.ones(9, 130).bfloat16(), 1, out=weight),
    "several": lambda weight: torch._foreach_add_([weight], 1),
    "NumPy": lambda weight: weight.half().numpy() is None or weight.detach().numpy().fill(0),
}


@pytest.mark.parametrize("of", [lambda p: p.weight, lambda p: p.weight.data], ids=["weight", "data"])
@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_writes_in_place_are_refused(name, of):
    packed = PackedLinear.from_linear(linear(dtype=torch.float16))
    before = packed.to_linear().weight.clone()
    with pytest.raises((RuntimeError, ValueError), match=r"packed weight|read-only|dtype"):
        WRITES[name](of(packed))
    assert torch.equal(packed.to_linear().weight, before)


@pytest.mark.parametrize("of", [lambda p: p.weight, lambda p: p.weight.data, lambda p: p.weight.view(-1, 10)])
def test_dlpack_gives_a_copy(of):
    plain = linear(dtype=torch.float16)
    packed = PackedLinear.from_linear(plain)
    held = packed.weight.detach().unpack()
    for given in (torch.from_dlpack(of(packed)), torch.from_numpy(np.array(np.from_dlpack(of(packed))))):
        assert torch.equal(given.flatten(), plain.weight.flatten())
        given.zero_()
    assert torch.equal(packed.to_linear().weight, plain.weight) and torch.equal(held, plain.weight)
    with pytest.raises(BufferError, match="packed weight"):
        of(packed).__dlpack__(copy=False)


def test_rows_without_data_have_a_shape():
    packed = PackedLinear.from_linear(linear()).to("meta")
    y = packed(torch.empty(3, 130, dtype=torch.bfloat16, device="meta"))
    assert y.is_meta and (y.shape, y.dtype) == ((3, 9), torch.bfloat16)


def test_assignment_changes_the_weight():
    packed, other = PackedLinear.from_linear(linear()), linear()
    x = torch.randn(3, 130).bfloat16()
    packed.weight.data = other.weight.data
    assert isinstance(packed.weight, PackedMatrix) and torch.equal(packed.weight, other.weight)
    packed.weight.data = packed.weight.data
    assert torch.equal(packed.weight, other.weight)
    packed.weight = nn.Parameter(other.weight.detach() * 2)  # a plain parameter in its place is used as it is
    assert packed.packed is None
    assert torch.equal(packed(x), nn.functional.linear(x, packed.weight, packed.bias))
    with pytest.raises(RuntimeError, match=r"expected \[9, 130\], got \[130, 9\]"):
        PackedLinear.from_linear(linear()).weight.data = other.weight.data.T
    with pytest.raises(RuntimeError, match="frozen"):
        PackedLinear.from_linear(linear()).requires_grad_(True)


def test_ids_that_are_no_integers_are_an_error():
    packed = PackedEmbedding.from_embedding(nn.Embedding(5, 70).bfloat16())
    for ids in (torch.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.int16)):
        with pytest.raises(ValueError, match="ids: expected int64 or int32, got"):
            packed(ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedLinear(8, 8, weights="float32"), "weights: expected bfloat16, float16 or float8_e5m2"),
        (
            lambda: PackedLinear.from_linear(nn.Linear(8, 8)),
            "weight: expected bfloat16, float16 or float8_e5m2",
        ),
        (lambda: PackedLinear(8, 8, matrix=PackedLinear(8, 9).packed), "matrix: expected \\[8, 8\\]"),
        (lambda: PackedEmbedding(8, 8, weights="int8"), "weights: expected bfloat16, float16 or float8_e5m2"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
