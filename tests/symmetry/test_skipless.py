"""Skipless models lose a whole matrix a layer, exactly; what has skips or norms is refused, with the reason."""

import pytest
import torch

pytest.importorskip("transformers")

from gaugekit.hf.sas import SASConfig, SASForCausalLM, SASForMaskedLM, SASModel
from gaugekit.symmetry import JointBasis, absorb

FULL = {"norm": "none", "values": True, "outputs": True}
KINDS = {
    "skipless": {**FULL, "block": "skipless"},
    "skipless, gated": {**FULL, "block": "skipless", "hidden_act": "swiglu"},
    "skipless, shared keys": {**FULL, "block": "skipless", "num_key_value_heads": 2, "rope": True},
    "sas_p": {**FULL, "block": "sas_p"},
    "sas_p, gated, rope": {**FULL, "block": "sas_p", "hidden_act": "geglu", "rope": True},
}
SIZES = dict(vocab_size=31, n_embd=8, n_layer=3, n_head=4, intermediate_size=12, pad_token_id=0)
IDS = torch.tensor([[3, 17, 5, 9, 22, 1, 30], [7, 7, 2, 11, 29, 14, 8]])


def build(kind, cls=SASForCausalLM, **changes):
    torch.manual_seed(1)
    model = cls(SASConfig(**{**SIZES, **KINDS[kind], **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3 if parameter.dim() == 1 else 8**-0.5)
    return model


def output(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids)[0]


def far(model, expected):
    return ((output(model) - expected).norm() / expected.norm()).item()


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matrix", ["value", "query", "key", "output"])
def test_a_matrix_goes_and_the_function_stays(kind, matrix):
    model = build(kind)
    expected, before = output(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if matrix == "output" and kind.startswith("sas_p"):
        with pytest.raises(ValueError, match="expected 'value', 'query' or 'key' for block 'sas_p'"):
            absorb(model, matrix)
        return
    if matrix == "key" and "shared" in kind:
        with pytest.raises(ValueError, match=r"expected a square key matrix, got \(8, 4\) in layer 1"):
            absorb(model, matrix)
        return
    result = absorb(model, matrix)
    assert type(result) is SASForCausalLM and result is not model
    assert far(result, expected) <= 1e-12
    gone = 3 if matrix == "output" else 2  # the first layer keeps the other three
    more = 2 if matrix == "value" else 0  # α and β of the first layer's value matrix
    assert numbers(model) - numbers(result) == 64 * gone - more
    parts = [type(getattr(block.attention, matrix)).__name__ for block in result.model.layers]
    empty = "Identity" if matrix in ("query", "key") else "NoneType"
    first = {"value": "IdentityLinear", "output": "NoneType"}.get(matrix, "Linear")
    assert parts == [first, empty, empty]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("other", ["value", "query", "key"])
def test_attention_without_value_and_output_products_end_to_end(other, tmp_path):
    """From a checkpoint with all four matrices: saved, loaded, and the same greedy tokens."""
    model = build("skipless")
    model.save_pretrained(tmp_path / "full")
    full = SASForCausalLM.from_pretrained(tmp_path / "full")
    result = absorb(absorb(full, "output"), other)
    assert far(result, output(model)) <= 1e-12
    result.save_pretrained(tmp_path / "result")
    loaded = SASForCausalLM.from_pretrained(tmp_path / "result")
    assert far(loaded, output(result)) <= 1e-12 and loaded.dtype == torch.float64
    for layer in loaded.model.layers[1:]:
        assert layer.attention.output is None
        assert sum(p.dim() == 2 for p in layer.attention.parameters()) == 2
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS[:1], **options), model.generate(IDS[:1], **options))
    with pytest.raises(ValueError, match=f"expected a {other} matrix in every layer, got none in some"):
        absorb(loaded, other)


def test_other_heads_dtypes_and_modes():
    masked = build("skipless", SASForMaskedLM)
    assert far(absorb(masked), output(masked)) <= 1e-12
    bare = build("skipless", SASModel)
    assert far(absorb(bare, "query"), output(bare)) <= 1e-12
    single = build("sas_p").float().train()
    result = absorb(single)
    assert result.dtype == torch.float32 and result.training
    assert far(result.eval(), output(single.eval())) < 1e-5


def test_a_result_trains():
    """One step of the smaller model: every matrix that is left learns."""
    result = absorb(absorb(build("skipless"), "output")).train()
    result(input_ids=IDS, labels=IDS).loss.backward()
    still = {name for name, p in result.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set()


@pytest.mark.parametrize("kind", ["skipless", "sas_p"])
def test_the_joint_basis_is_a_group_of_the_model(kind):
    group, model = JointBasis(), build(kind)
    expected, original = output(model), build(kind)
    assert group.dimension(model) == 2 * 64
    group.act(model, group.random(model, torch.Generator().manual_seed(2)))
    changed = [
        name
        for name, tensor in original.state_dict().items()
        if not torch.equal(tensor, model.state_dict()[name])
    ]
    assert far(model, expected) <= 1e-12 and any("layers.1.attention.query" in name for name in changed)
    assert group.contains(original, model)
    other = build(kind)
    with torch.no_grad():
        other.model.layers[1].attention.key.weight.copy_(model.model.layers[1].attention.key.weight)
    assert far(other, expected) > 1e-3 and not group.contains(original, other)
    group.fix(model, "key")
    assert far(model, expected) <= 1e-11
    eye = torch.eye(8, dtype=torch.float64)
    for layer in model.model.layers[1:]:
        torch.testing.assert_close(layer.attention.key.weight, eye, rtol=0, atol=1e-12)
    again = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    group.fix(model, "key")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"block": "sas", "norm": "rms", "values": True}, "a skip that carries the stream on"),
        ({"block": "pre_ln", "norm": "layer"}, "a skip that carries the stream on"),
        (
            {"block": "sas_p", "norm": "rms", "values": True, "outputs": True},
            r"a norm \('rms'\) stands before each layer",
        ),
        ({"block": "sas_p", "norm": "none", "values": True}, "no output matrix takes up another basis"),
    ],
)
def test_skips_norms_and_slices_are_in_the_way(changes, reason):
    model = SASForCausalLM(SASConfig(**SIZES, **changes)).double()
    assert JointBasis().dimension(model) == 0
    with pytest.raises(ValueError, match=f"its value matrices cannot be absorbed: .*{reason}"):
        absorb(model)
    with pytest.raises(ValueError, match=f"joint_basis: this model has no such freedom .*{reason}"):
        JointBasis().act(model, torch.zeros(2, 8, 8))


def test_what_cannot_be_absorbed_says_why():
    model = build("skipless")
    with pytest.raises(ValueError, match="matrix: expected one of value, query, key, output; got 'mlp'"):
        absorb(model, "mlp")
    with pytest.raises(ValueError, match="it is no skipless model of gaugekit's"):
        absorb(torch.nn.Linear(2, 2))
    with torch.no_grad():
        model.model.layers[2].attention.value.weight[0] = 0
    with pytest.raises(
        ValueError, match="expected an invertible value matrix in layer 2, got a singular one"
    ):
        absorb(model)
    with pytest.raises(ValueError, match=r"joint_basis: expected shape \(2, 8, 8\), got \(2, 4, 4\)"):
        JointBasis().act(build("skipless"), torch.zeros(2, 4, 4))


def states(*models):
    return [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]


def same(before, *models):
    pairs = zip(before, states(*models), strict=True)
    return all(torch.equal(tensor, now[name]) for state, now in pairs for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["skipless", "sas_p"])
@pytest.mark.parametrize("damage", ["zero row", "equal rows", "infinity"])
def test_what_cannot_be_fixed_stays_as_it_is(kind, damage):
    """Nothing is written before the last layer is known to be invertible."""
    group, model, sound = JointBasis(), build(kind), build(kind)
    weight = model.model.layers[2].attention.value.weight
    with torch.no_grad():
        weight[0] = weight[1] if damage == "equal rows" else 0.0
        weight[0, 0] = float("inf") if damage == "infinity" else weight[0, 0]
    before = states(model, sound)
    message = "expected an invertible value matrix in layer 2, got a singular one"
    if damage == "infinity":
        message = "expected finite numbers in the value matrix in layer 2, got NaN or infinity"
    for call in (lambda: group.fix(model), lambda: group.contains(model, sound), lambda: absorb(model)):
        with pytest.raises(ValueError, match=f"matrix: {message}"):
            call()
        assert same(before, model, sound)
    assert group.contains(sound, model) is False and same(before, model, sound)
    singular = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
    singular[1, 0] = singular[1, 1]
    with pytest.raises(
        ValueError,
        match="element of joint_basis: expected an invertible matrix before layer 2, got a singular one",
    ):
        group.act(sound, singular)
    assert same(before, model, sound)


def test_what_has_no_such_matrix_is_refused_by_all_of_the_group():
    group, model = JointBasis(), build("skipless")
    small, before = absorb(model), states(model)[0]
    with pytest.raises(ValueError, match="model: expected a value matrix in every layer, got none in some"):
        group.fix(small)
    with pytest.raises(
        ValueError, match="joint_basis: expected matrices for queries, keys and values, got none for"
    ):
        group.fix(small, "query")
    with pytest.raises(ValueError, match="it is no skipless model of gaugekit's"):
        group.fix(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="matrix: expected one of value, query, key, output; got 'foo'"):
        group.fix(model, "foo")
    with pytest.raises(ValueError, match="matrix: expected one of value, query, key; got 'output'"):
        group.fix(model, "output")
    with pytest.raises(ValueError, match=r"expected a square key matrix, got \(8, 4\) in layer 1"):
        group.fix(build("skipless, shared keys"), "key")
    assert group.contains(model, small) is False and group.contains(model, torch.nn.Linear(2, 2)) is False
    with pytest.raises(ValueError, match="model: expected a value matrix in every layer, got none in some"):
        group.contains(small, model)
    assert same([before], model)
    single = build("skipless", n_layer=1)
    group.fix(single)
    assert same(states(build("skipless", n_layer=1)), single)


@pytest.mark.gpu
def test_a_result_stays_on_the_device():
    model = build("sas_p").cuda()
    result = absorb(model)
    assert {parameter.device for parameter in result.parameters()} == {next(model.parameters()).device}
    with torch.no_grad():
        expected = model(input_ids=IDS.cuda())[0]
        assert (result(input_ids=IDS.cuda())[0] - expected).norm() <= 1e-12 * expected.norm()
        group, moved = JointBasis(), build("sas_p").cuda()
        group.act(moved, group.random(moved))
        assert (moved(input_ids=IDS.cuda())[0] - expected).norm() <= 1e-12 * expected.norm()
    assert group.contains(model, moved)


def test_configs_of_the_matrices():
    with pytest.raises(ValueError, match="query: expected True unless 4 · 6 is width = 8, got False"):
        SASConfig(**SIZES, queries=False, key_width=6)
    with pytest.raises(ValueError, match="expected their defaults for block 'pre_ln'"):
        SASConfig(**SIZES, block="pre_ln", norm="layer", values=True)
    model = SASForCausalLM(SASConfig(**SIZES, block="skipless", norm="none", queries=False))
    assert [type(block.attention.query).__name__ for block in model.model.layers] == [
        "Linear",
        "Identity",
        "Identity",
    ]
