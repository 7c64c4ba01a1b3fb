"""NeuTRENO modules against the equation by hand; checkpointing, caching, compilation, λ in all its forms."""

import copy
import statistics
from pydoc_data.topics import topics

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gaugekit as gk
from helpers import assert_accurate

nn = gk.nn


def stack(layers=3, lam=0.6, checkpoint=False, dtype=torch.float64, **options):
    made = nn.ValueSharing(
        (nn.NeutrenoBlock(16, 4, lam=lam, **{"std": 0.3, **options}) for _ in range(layers)),
        checkpoint=checkpoint,
    ).to(dtype)
    return made


def by_hand(model, x, lam, lengths=None, mix=False):
    """The paper's equation with every matrix written out, layer by layer."""
    v0 = None
    for block in model.layers:
        attention, h = block.attention, block.norm(x)
        heads = attention.heads
        parts = (attention.query, attention.key, attention.value)
        q, k, v = (part(h).unflatten(-1, (-1, 4)).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
        first = v if v0 is None else v0
        if v0 is not None and mix:
            v = (1 - lam) * v + lam * v0
        scores = (q @ k.mT / 2).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
        y = scores.softmax(-1) @ v
        if v0 is not None and not mix:
            y = y + lam * (v0 - v)
        v0 = first
        x = x + attention.output(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.mlp_norm(x))
    return x


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
def test_layers_follow_the_equation(groups, mix):
    model, x = stack(groups=groups, mix=mix), torch.randn(2, 9, 16, dtype=torch.float64)
    expected = by_hand(model, x, model.layers[0].attention.lam[0], mix=mix)
    assert_accurate(model(x).detach(), expected.detach(), expected.detach(), ulps=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lambda_zero_is_plain_attention(dtype):
    plain, x = stack(lam=0.0, dtype=dtype), torch.randn(2, 9, 16, dtype=dtype)
    alone = x
    for layer in plain.layers:
        alone, _ = layer(alone)  # every layer called as a first one
    assert torch.equal(plain(x), alone)


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("options", [{}, {"rotary_base": 100.0}, {"window": 3}], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_cached_decoding_is_the_full_forward(mix, options, ragged):
    model, x = stack(mix=mix, groups=2, **options).eval(), torch.randn(2, 9, 16, dtype=torch.float64)
    lengths = torch.tensor([4, 5]) if ragged else None
    with torch.no_grad():
        caches = [nn.LayerCache() for _ in model.layers]
        parts = [model(x[:, :5], caches=caches, lengths=lengths)]
        parts += [model(x[:, t : t + 1], caches=caches) for t in (5, 6)]
        parts.append(model(x[:, 7:], caches=caches))  # a chunk
        found = torch.cat(parts, dim=1)
        if not ragged:
            assert_accurate(found, model(x), model(x), ulps=64)
            return
        short = torch.cat([x[:1, :4], x[:1, 5:]], dim=1)  # the first sequence without its padding row
        whole, other = model(short), model(x[1:])
    assert_accurate(torch.cat([found[:1, :4], found[:1, 5:]], dim=1), whole, whole, ulps=64)
    assert_accurate(found[1:], other, other, ulps=64)


def test_gradient_checkpointing_changes_no_bit():
    plain, x = stack(dtype=torch.float32, trained=True), torch.randn(2, 9, 16)
    saving = copy.deepcopy(plain)
    saving.checkpoint = True
    calls = []
    saving.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        model(x).square().sum().backward()
    assert len(calls) == 2
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert (theirs.grad is None and ours.grad is None) or torch.equal(ours.grad, theirs.grad)
    assert plain.layers[0].attention.value.weight.grad.any()


@pytest.mark.parametrize("mix", [False, True])
def test_the_first_values_get_the_gradient_of_every_layer(mix):
    """By finite differences of the whole stack, λ and the first layer's value matrix among the leaves."""
    model = stack(layers=2, mix=mix, trained=True)
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    names = ["layers.0.attention.value.weight", "layers.1.attention.lam"]
    leaves = [dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in names]

    def loss(*tensors):
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,)).square().sum()

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_compiles_as_one_graph_and_sees_a_new_lambda():
    torch._dynamo.reset()
    model, x = stack(layers=2, dtype=torch.float32), torch.randn(2, 6, 16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    schedule = nn.LamSchedule(model, lambda step: 0.2 * step)
    for _ in range(2):
        assert_accurate(compiled(x).detach(), model(x).detach().double(), model(x).detach())
        schedule.step()
    assert counter.frame_count == 1


def test_lambda_fixed_per_head_trained_or_scheduled():
    assert "lam" in dict(nn.NeutrenoAttention(16, 4, trained=True).named_parameters())
    fixed = nn.NeutrenoAttention(16, 4, lam=[0.1, 0.2, 0.3, 0.4])
    assert torch.equal(fixed.state_dict()["lam"], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    model = stack()
    schedule = nn.LamSchedule(model, lambda step: 1.0 / (1 + step))
    schedule.step()
    assert all((layer.attention.lam == 0.5).all() for layer in model.layers)
    again = nn.LamSchedule(stack(), lambda step: 1.0 / (1 + step))
    again.load_state_dict(schedule.state_dict())
    assert again.count == 1 and (again.attentions[0].lam == 0.5).all()


def cosine(x):
    unit = torch.nn.functional.normalize(x, dim=-1)
    n = x.shape[1]
    return ((unit.sum(1).square().sum(-1) - n) / (n * (n - 1))).mean()


def test_it_keeps_tokens_apart_at_initialisation():
    """Random layers over-smooth; λ = 0.6 holds their outputs back."""
    torch.manual_seed(1)
    found = []
    for lam in (0.0, 0.6):
        torch.manual_seed(2)
        model = stack(layers=4, lam=lam, dtype=torch.float32)
        states = []
        model(torch.randn(4, 64, 16), states=states)
        found.append(cosine(states[-1].detach()))
    assert found[1] < 0.8 * found[0]


WRONG = [
    (lambda: nn.NeutrenoAttention(16, 3), "heads, groups: expected divisors"),
    (lambda: nn.NeutrenoAttention(16, 4, groups=3), "heads, groups: expected divisors"),
    (
        lambda: nn.NeutrenoAttention(16, 4, lam=[0.1, 0.2]),
        r"lam: expected a number, or \[G\] with mix, else \[H\]",
    ),
    (lambda: nn.NeutrenoAttention(16, 4)(torch.randn(2, 3, 8)), r"x: expected \[B, T, 16\]"),
    (
        lambda: nn.NeutrenoAttention(16, 4, causal=False)(torch.randn(1, 3, 16), cache=nn.LayerCache()),
        "cache: ",
    ),
    (
        lambda: nn.LamSchedule(stack(trained=True), lambda step: 0.0),
        "model: expected NeutrenoAttention whose",
    ),
    (
        lambda: nn.LamSchedule(torch.nn.Linear(2, 2), lambda step: 0.0),
        "model: expected NeutrenoAttention whose",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=lambda x: x[:12] if isinstance(x, str) else "")
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_less_smoothing_at_the_start():
    """4 layers, 128 wide, on English bytes, before training: a token cosine of .42 without λ, .28 with λ = 0.6.

    Each is a figure of one seed on another English text (Shakespeare's), so it must lie in the 95 % interval for one
    more draw (Student's t) that eight seeds here give.
    """
    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
    found = {}
    for lam, expected in ((0.0, 0.42), (0.6, 0.28)):
        found[lam] = []
        for seed in range(8):
            torch.manual_seed(seed)
            embed, place = torch.nn.Embedding(256, 128), 0.02 * torch.randn(64, 128)
            model = nn.ValueSharing(
                nn.NeutrenoBlock(128, 4, lam=lam, norm="rms", std=128**-0.5) for _ in range(4)
            )
            rows = torch.randint(len(text) - 64, (16, 1)) + torch.arange(64)
            with torch.no_grad():
                x = torch.nn.functional.normalize(model(embed(text[rows].long()) + place), dim=-1)
            found[lam].append(((x.sum(1).square().sum(-1) - 64) / (64 * 63)).mean().item())
        reach = 2.365 * statistics.stdev(found[lam]) * (1 + 1 / 8) ** 0.5
        assert abs(statistics.fmean(found[lam]) - expected) <= reach < 0.14
    assert all(less < more for more, less in zip(found[0.0], found[0.6], strict=True))
