"""Linear layers of packed float8_e5m2 weights: the numbers as they are, without a scale, in whatever dtype x has."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file, save_model
from torch import nn

import gaugekit as gk
from gaugekit.nn import PackedEmbedding, PackedLinear, forms
from gaugekit.nn.packed_matrix import PARTS
from helpers import assert_accurate

E5M2 = torch.float8_e5m2


def linear(inputs=130, outputs=9, dtype=torch.bfloat16):
    layer = nn.Linear(inputs, outputs, dtype=dtype)
    layer.weight = nn.Parameter(layer.weight.detach().to(E5M2), requires_grad=False)
    return layer


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_there_and_back_and_the_product(kind, rows):
    plain = linear()
    packed = PackedLinear.from_linear(plain)
    assert packed.weight.dtype == E5M2 and same(packed.to_linear().weight, plain.weight)
    x = torch.randn(rows, 130).to(kind)
    exact = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
    y = packed(x)
    assert y.dtype == kind
    assert_accurate(
        y.detach(), exact, nn.functional.linear(x, plain.weight.to(kind), plain.bias.to(kind)).detach()
    )


def test_bytes():
    packed = PackedLinear.from_linear(linear(1024, 256))
    assert packed.packed_bytes == gk.pack_weight(packed.weight.detach().clone()).bytes < 0.8 * 1024 * 256


@pytest.mark.parametrize("under", [torch.bfloat16, torch.float16])
def test_autocast(under):
    plain = linear(dtype=torch.float32)
    packed = PackedLinear.from_linear(plain)
    x = torch.randn(3, 130).requires_grad_()
    with torch.autocast("cpu", dtype=under):
        y = packed(x)
    assert y.dtype == under
    expected = nn.functional.linear(x.detach().to(under), plain.weight.to(under), plain.bias.to(under))
    exact = nn.functional.linear(x.detach().double(), plain.weight.double(), plain.bias.double())
    assert_accurate(y.detach(), exact, expected.detach())
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.count_nonzero() == x.grad.numel()


def test_states_copies_and_pickles(tmp_path):
    plain = nn.Sequential(linear(130, 130), linear(130, 130))
    packed = nn.Sequential(*(PackedLinear.from_linear(layer) for layer in plain))
    buffer = io.BytesIO()
    torch.save(packed.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert all(same(state[name], tensor) for name, tensor in plain.state_dict().items())
    save_model(packed, tmp_path / "m.safetensors")  # which drops what shares a storage
    assert load_file(tmp_path / "m.safetensors").keys() == state.keys()
    other = nn.Sequential(*(PackedLinear.from_linear(linear(130, 130)) for _ in range(2)))
    other.load_state_dict(state)
    x = torch.randn(2, 130).bfloat16()
    for twin in (other, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(x), packed(x)) and twin[0].weight.dtype == E5M2
    parts = {f"packed.{name}": getattr(packed[0].packed, name).clone() for name in PARTS}
    other[1].load_state_dict(parts | {"bias": packed[0].bias.detach()})
    assert torch.equal(other[1](x), packed[0](x))
    narrow = PackedLinear(130, 130)
    with pytest.raises(ValueError, match=r"expected torch.bfloat16 \[130, 130\], got torch.float8_e5m2"):
        narrow.load_state_dict(parts | {"bias": packed[0].bias.detach()})


def test_forms_and_devices():
    arguments = {"inputs": 130, "outputs": 9, "weights": "float8_e5m2"}
    made = forms.build({"form": "packed_linear", "arguments": arguments}, dtype=torch.bfloat16)
    packed = PackedLinear.from_linear(linear())
    made.load_state_dict(packed.state_dict())
    x = torch.randn(3, 130).bfloat16()
    assert torch.equal(made(x), packed(x))
    assert PackedLinear(130, 9, weights="float8_e5m2").bias.dtype == torch.get_default_dtype()
    made.to("meta")
    assert made.packed.raw.is_meta and made.packed.value.dtype == E5M2
    with pytest.raises(ValueError, match="weights: expected bfloat16, float16 or float8_e5m2"):
        PackedLinear(130, 9, weights="float8_e4m3fn")


def test_compiles_for_any_number_of_rows():
    packed = PackedLinear.from_linear(linear())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed, fullgraph=True, backend=counter, dynamic=True)
    for rows in (2, 40, 300):
        x = torch.randn(rows, 130).bfloat16()
        assert torch.equal(compiled(x), packed(x))
    assert counter.frame_count == 1


def test_adapter_around_it_learns():
    packed, down = PackedLinear.from_linear(linear()), nn.Linear(130, 130, dtype=torch.bfloat16)
    packed(down(torch.randn(4, 130).bfloat16())).sum().backward()
    assert down.weight.grad.count_nonzero() and packed.bias.grad is not None
    assert [name for name, p in packed.named_parameters() if p.requires_grad] == ["bias"]


def test_embeddings_by_hand_give_rows_of_it():
    table = nn.Embedding(50, 70)
    table.weight = nn.Parameter(table.weight.detach().to(E5M2), requires_grad=False)
    ids = torch.tensor([[3, 0], [49, 3]])
    assert same(PackedEmbedding.from_embedding(table)(ids), table.weight.detach()[ids])
