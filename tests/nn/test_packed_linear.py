"""Packed layers: the numbers of plain ones, through saving, moving, copying and training of what is around them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import gaugekit as gk
from gaugekit.nn import PackedEmbedding, PackedLinear, forms, packing
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
        self.embedding = nn.Embedding(50, 70)
        self.inner = nn.Linear(70, 70)
        self.head = nn.Linear(70, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.bfloat16()

    def forward(self, ids):
        return self.head(self.inner(self.embedding(ids)))


IDS = torch.arange(40).view(2, 20)


def test_tied_layers_share_one_matrix_and_come_back_tied():
    model = Tied()
    expected = model(IDS)
    done = packing.pack(model)
    assert set(done.packed) == {"embedding", "inner", "head"}
    assert model.head.packed is model.embedding.packed
    assert done.bytes_after == model.embedding.packed_bytes + model.inner.packed_bytes
    assert torch.equal(model(IDS), expected)
    model.to("meta")
    assert model.head.packed.raw.is_meta and model.head.packed is model.embedding.packed
    model = Tied()
    packing.unpack(model, list(packing.pack(model).packed))
    assert model.head.weight is model.embedding.weight and type(model.inner) is nn.Linear


def test_state_dict_round_trip():
    model, other = Tied(), Tied()
    for one in (model, other):
        packing.pack(one)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    other.load_state_dict(state)
    assert torch.equal(other(IDS), model(IDS))
    assert other.head.packed is other.embedding.packed
    state["inner.packed.raw"].zero_()
    assert torch.equal(other(IDS), model(IDS)), "loading copies"


def test_damaged_state_is_refused():
    model = PackedLinear.from_linear(linear())
    state = {name: part.clone() for name, part in model.state_dict().items()}
    state["packed.offsets"] += 1
    with pytest.raises(ValueError, match="packed.offsets"):
        model.load_state_dict(state)
    state = {name: part for name, part in model.state_dict().items() if name != "packed.raw"}
    with pytest.raises(RuntimeError, match="packed.raw"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="9 rows, got 8"):
        model.load_state_dict(PackedLinear.from_linear(linear(outputs=8)).state_dict())


def test_forms():
    packed = PackedLinear.from_linear(linear())
    made = forms.build(
        {"form": "packed_linear", "arguments": {"inputs": 130, "outputs": 9}}, dtype=torch.bfloat16
    )
    made.load_state_dict(packed.state_dict())
    x = torch.randn(3, 130).bfloat16()
    assert torch.equal(made(x), packed(x))
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


def test_pickling_is_refused_and_copying_is_not():
    packed = PackedLinear.from_linear(linear())
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(packed)
    model = Tied()
    packing.pack(model)
    twin = copy.deepcopy(model)
    assert twin.head.packed is twin.embedding.packed is not model.head.packed
    model.inner.packed.raw.zero_()
    assert not torch.equal(twin.inner.weight, model.inner.weight)


def test_adapter_on_a_frozen_packed_layer_learns():
    packed, down = PackedLinear.from_linear(linear()), nn.Linear(130, 130, dtype=torch.bfloat16)
    packed(down(torch.randn(4, 130).bfloat16())).sum().backward()
    assert down.weight.grad.abs().sum() > 0 and packed.bias.grad is not None
    assert [name for name, _ in packed.named_parameters()] == ["bias"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedLinear(8, 8, weights="float32"), "weights: expected bfloat16 or float16"),
        (lambda: PackedLinear.from_linear(nn.Linear(8, 8)), "weight: expected bfloat16 or float16"),
        (lambda: PackedLinear(8, 8, matrix=PackedLinear(8, 9).packed), "matrix: expected \\[8, 8\\]"),
        (lambda: PackedEmbedding(8, 8, weights="int8"), "weights: expected bfloat16 or float16"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
