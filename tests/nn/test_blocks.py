"""SASBlock, SASPBlock and PreLNBlock: their equations, starting values, gradients and parameter counts."""

import copy
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gaugekit import nn

BLOCKS = {"sas": nn.SASBlock, "sas_p": nn.SASPBlock, "pre_ln": nn.PreLNBlock}


def norm(x, kind):
    if kind == "rms":
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-8).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-8).sqrt()


def softmax_attention(module, x):
    batch, rows, width = x.shape
    q, k, v = (
        project(x).view(batch, rows, module.heads, -1).transpose(1, 2)
        for project in (module.query, module.key, module.value)
    )
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(
        torch.ones(rows, rows).triu(1).bool(), -torch.inf
    )
    return module.output((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, rows, width))


def mlp(module, x):
    return torch.relu(x @ module.up.weight.T) @ module.down.weight.T


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_at_the_start_attention_passes_the_normalised_input_through(kind):
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    sas = nn.SASBlock(32, 4, norm=kind, beta_ff=0.25, first=True, dtype=torch.float64)
    a = norm(x, kind)
    torch.testing.assert_close(sas(x), a + 0.25 * mlp(sas.mlp, norm(a, kind)), rtol=1e-12, atol=1e-13)
    parallel = nn.SASPBlock(32, 4, norm=kind, beta_ff=0.25, dtype=torch.float64)
    torch.testing.assert_close(parallel(x), a + 0.25 * mlp(parallel.mlp, a), rtol=1e-12, atol=1e-13)
    bare = nn.SASPBlock(32, 4, norm="none", beta_ff=0.25, dtype=torch.float64)
    torch.testing.assert_close(bare(x), x + 0.25 * mlp(bare.mlp, x), rtol=1e-12, atol=1e-13)
    standard = nn.PreLNBlock(32, 4, norm=kind, dtype=torch.float64)
    a = x + softmax_attention(standard.attention, norm(x, kind))
    torch.testing.assert_close(standard(x), a + mlp(standard.mlp, norm(a, kind)), rtol=1e-12, atol=1e-13)


def test_starting_values():
    torch.manual_seed(1)
    for block in (nn.SASBlock(256, 4, first=True), nn.SASPBlock(256, 4, first=True)):
        attention = block.attention
        assert not attention.query.weight.any() and not attention.value.weight.any()
        assert all((getattr(attention, name) == 1).all() for name in ("alpha", "beta", "gamma"))
        assert block.beta_ff.item() == pytest.approx(0.1)
        for matrix in (attention.key, block.mlp.up, block.mlp.down):
            assert matrix.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.beta_sa.item() == 1
    standard = nn.PreLNBlock(256, 4).attention
    for matrix in (standard.query, standard.key, standard.value, standard.output):
        assert matrix.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_what_is_saved():
    """Two D × D matrices a layer, less a few gains."""
    count = {name: sum(p.numel() for p in cls(64, 4).parameters()) for name, cls in BLOCKS.items()}
    assert count["pre_ln"] == 12 * 64**2 + 2 * 64
    assert count["sas"] == 10 * 64**2 + 2 * 64 + 3 * 4 + 1
    assert count["sas_p"] == 10 * 64**2 + 64 + 3 * 4 + 2


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "geglu", "swiglu"])
def test_every_parameter_gets_a_gradient(name, activation):
    """None is unused, which distributed training would stumble over."""
    options = {} if name == "pre_ln" else {"first": True}
    block = BLOCKS[name](32, 4, activation=activation, **options)
    (block(torch.randn(2, 5, 32)) ** 2).sum().backward()
    assert [key for key, p in block.named_parameters() if p.grad is None] == []
    moving = {key for key, p in block.named_parameters() if p.grad.any()}
    still = {"attention.key.weight", "attention.value.beta"}  # behind W_Q = 0 and ΔW = 0 at the first step
    assert {key for key, _ in block.named_parameters()} - moving == (still if options else set())


@pytest.mark.parametrize("name", BLOCKS)
def test_gated_mlp(name):
    block = BLOCKS[name](16, 2, activation="geglu", hidden=20, dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64)
    gate, up, down = (m.weight for m in (block.mlp.gate, block.mlp.up, block.mlp.down))
    expected = (torch.nn.functional.gelu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(block.mlp(x), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_under_compile(name):
    block = BLOCKS[name](32, 4, rotary_base=1e4)
    x = torch.randn(2, 6, 32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend=counter)
    out, expected = compiled(x), block(x)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(compiled.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_under_autocast(name):
    """Matrices in bfloat16, gains and norms in float32; the same numbers to bfloat16."""
    block = BLOCKS[name](32, 4)
    x = torch.randn(2, 6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())
    expected = block(x)
    assert (out.float() - expected).norm() <= 2**-7 * expected.norm()


def test_parameter_groups():
    model = torch.nn.Sequential(nn.SASBlock(32, 4, first=True), nn.SASPBlock(32, 4))
    model[1].mlp.down.weight = model[0].mlp.down.weight  # shared
    model[1].norm.weight.requires_grad_(False)
    matrices, rest = nn.parameter_groups(model, 0.25)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in matrices["params"]}
    kept = {names[id(p)] for p in rest["params"]}
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    gains = {f"{i}.attention.{gain}" for i in (0, 1) for gain in ("alpha", "beta", "gamma")}
    assert gains | {"0.beta_ff", "1.beta_ff", "1.beta_sa", "0.attention.value.alpha"} <= kept
    assert len(decayed) + len(kept) == len(list(model.parameters())) - 1
    with pytest.raises(ValueError, match="weight_decay"):
        nn.parameter_groups(model, -0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"norm": "batch"}, "norm: expected one of rms, layer, none; got 'batch'"),
     ({"activation": "tanh"}, "activation: expected one of relu"), ({"heads": 5}, "heads")],
)  # fmt: skip
@pytest.mark.parametrize("name", BLOCKS)
def test_bad_input(name, options, message):
    with pytest.raises(ValueError, match=message):
        BLOCKS[name](32, **({"heads": 4} | options))
