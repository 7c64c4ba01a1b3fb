"""A sliced directory is a model like any other: it loads, generates, compiles, trains, saves and packs."""

import copy
import pickle
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import gaugekit as gk  # noqa: E402
import gaugekit.integrations.transformers  # noqa: E402
from gaugekit.nn.shortcuts import PolarShortcut, TriangularShortcut  # noqa: E402
from gaugekit.nn.sliced import Carry, SlicedNorm, SlicedWriter  # noqa: E402
from gaugekit.nn.triangle import unpack_triangle  # noqa: E402
from sliceable import ids, save  # noqa: E402

SIZES = dict(window=32, windows=8)
WORDS = ["the quick brown fox", "jumps over"]


@pytest.fixture(scope="module", params=["llama tied", "gpt2"])
def sliced(request, tmp_path_factory):
    """Directories of one slicing: {"polar": ..., "triangular": ..., "head": polar, its head sliced too}."""
    folder = tmp_path_factory.mktemp("sliced")
    source, text = save(request.param, folder)
    for name, options in (
        ("polar", {"rotation": "polar"}),
        ("triangular", {"rotation": "triangular"}),
        ("head", {"rotation": "polar", "head": True}),
    ):
        gk.slicing.slice(source, folder / name, 0.25, calibration=text, **options, **SIZES)
    return folder


@pytest.fixture(params=["polar", "triangular", "head"])
def directory(request, sliced):
    return sliced / request.param


def load(directory, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def test_greedy_tokens_with_a_cache_are_those_without(directory):
    model = load(directory, torch.float64)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids())}
    cached = model.generate(ids(), use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids(), use_cache=False, **options)) and cached.shape == (2, 24)


def test_what_is_saved_again_loads_again(directory, tmp_path):
    model = load(directory)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert again.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape


def test_packed_it_gives_the_same_numbers(sliced, tmp_path):
    gk.codec.pack(sliced / "polar", tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "packed")(ids()).logits, load(sliced / "polar")(ids()).logits)


def test_verify_passes_between_two_forms(sliced):
    report = gk.verify(
        sliced / "triangular", sliced / "polar", dtype="float32", text=["the quick brown fox", "jumps over"]
    )
    assert report["ok"] and report["relative_error"] > 0


def test_it_compiles_whole(directory):
    torch._dynamo.reset()  # what other tests compiled of the same code would be widened first, in a graph more
    model = load(directory)
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    with torch.no_grad():
        expected = model(ids(), use_cache=False).logits
        got = compiled(ids(), use_cache=False).logits
    assert counted.frame_count == 1
    torch.testing.assert_close(got, expected)


def test_threads_do_not_take_each_others_streams(directory):
    model = load(directory)
    inputs = [ids(1, length) for length in (5, 9, 12, 3)] * 4
    with torch.no_grad():
        expected = [model(tokens).logits for tokens in inputs]
    results: dict[int, torch.Tensor] = {}

    def run(number):
        with torch.no_grad():
            results[number] = model(inputs[number]).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], logits) for number, logits in enumerate(expected))


def gradients(model):
    model.train()
    model(ids(), labels=ids(), use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_learns_also_through_checkpoints(directory):
    plain, checkpointed = load(directory, torch.float64), load(directory, torch.float64)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    expected, got = gradients(plain), gradients(checkpointed)
    assert all(gradient is not None and bool(gradient.any()) for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-12)


def test_a_matrix_is_made_anew_after_a_step(directory):
    model = load(directory)
    with torch.no_grad():
        before = model(ids()).logits
        for parameter in model.parameters():
            parameter.add_(0.05)
        after = model(ids()).logits
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        if hasattr(module, "_kept"):
            module._kept = None
    with torch.no_grad():
        assert torch.equal(fresh(ids()).logits, after) and not torch.equal(before, after)


def test_a_matrix_is_made_anew_for_an_evaluation_of_moving_averages(directory):
    model = load(directory)
    with torch.no_grad():
        before = model(ids()).logits
        for parameter in model.parameters():
            parameter.data.mul_(1.1)  # bumps no version
        after = model.eval()(ids()).logits
        assert torch.equal(copy.deepcopy(model)(ids()).logits, after) and not torch.equal(before, after)


def test_kept_matrices_are_in_no_pickle_and_go_with_a_change_of_dtype(sliced):
    model = load(sliced / "triangular")
    with torch.no_grad():
        expected = model(ids()).logits
    kept = [module for module in model.modules() if isinstance(module, TriangularShortcut)]
    assert kept and all(module._kept is not None for module in kept)
    copied = pickle.loads(pickle.dumps(model))
    assert all(module._kept is None for module in copied.modules() if isinstance(module, TriangularShortcut))
    with torch.no_grad():
        assert torch.equal(copied(ids()).logits, expected)
    model.double()
    assert all(module._kept is None for module in kept)


def test_a_head_of_another_kind_reads_a_whole_stream_alone(sliced):
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(sliced / "polar", num_labels=3, pad_token_id=0).eval()
    with torch.no_grad():
        assert model(ids()).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="whose own head reads 32 entries, not 24; slice without head=True"):
        kind.from_pretrained(sliced / "head", num_labels=3, pad_token_id=0)


def test_an_error_in_a_block_leaves_nothing_for_the_next_call(directory):
    model = load(directory)

    def failing(module, arguments, y):
        raise ArithmeticError("in the middle of a block")

    with torch.no_grad():
        expected = model(ids()).logits
        norm = next(module for module in model.modules() if isinstance(module, SlicedNorm))
        handle = norm.register_forward_hook(failing)
        with pytest.raises(ArithmeticError):
            model(ids(rows=1))
        handle.remove()
        assert torch.equal(model(ids()).logits, expected)


def test_the_bare_model_answers_the_stream_the_head_would_read(sliced):
    model = transformers.AutoModel.from_pretrained(sliced / "polar").eval()
    with torch.no_grad():
        assert model(ids()).last_hidden_state.shape == (2, 12, 32)
        assert transformers.AutoModel.from_pretrained(sliced / "head")(ids()).last_hidden_state.shape == (
            2,
            12,
            24,
        )


def test_verbs_that_need_a_plain_model_say_so(sliced):
    for subject in (sliced / "polar", load(sliced / "polar")):
        with pytest.raises(ValueError, match="whose residual stream was sliced; use the original"):
            gk.inspect(subject)
    with pytest.raises(ValueError, match="expected plain weights, got a checkpoint stored as 'gaugekit'"):
        gk.slicing.slice(sliced / "polar", sliced / "twice", 0.5, calibration=sliced / "text.txt")


def test_a_norm_divides_by_the_unsliced_width():
    x = torch.tensor([[3.0, 4.0, 0.0]])
    carry = Carry()
    y = SlicedNorm(100, 2, 0.0, carry)(x)
    torch.testing.assert_close(
        y, torch.tensor([[6.0, 8.0]])
    )  # Σx² = 25, over 100: a quarter; the root is a half
    assert torch.equal(carry.take(), x[:, :2])


def test_a_writer_without_its_norm_is_an_error():
    shortcut = PolarShortcut(2, 0)
    writer = SlicedWriter(3, 2, False, padded=2, shortcut=shortcut, carry=Carry())
    with pytest.raises(RuntimeError, match="ran without the norm before it"):
        writer(torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shortcuts_by_hand(dtype):
    x, y = torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([[10.0, 20.0]], dtype=dtype)
    triangular = TriangularShortcut(2, dtype=dtype)
    triangular.packed.data.copy_(torch.tensor([2.0, 3.0, 4.0]))
    # S = [[2, 0], [3, 4]]: x S = [8, 8]
    assert (y + 0 * x).tolist() == [[10.0, 20.0]] and triangular(y, x).tolist() == [[17.0, 26.0]]
    polar = PolarShortcut(2, 1, dtype=dtype)
    polar.packed.data.copy_(torch.tensor([1.0]))
    polar.rest.data.copy_(torch.tensor([[2.0]]))
    # Y = [1, 2]ᵀ: x Y Yᵀ = 5 · [1, 2]
    assert polar(y, x).tolist() == [[5.0, 10.0]]
    assert torch.equal(unpack_triangle(triangular.packed.detach(), 2), triangular.matrix().detach())
