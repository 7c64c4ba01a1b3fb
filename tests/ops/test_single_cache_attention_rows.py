"""Attention from one cache by the CUDA binary: when it is taken, and on a GPU beside the reference and Triton's."""

import pytest
import torch

import gaugekit as gk
from gaugekit import _library
from gaugekit.ops.single_cache_attention import choice, cuda, use_core
from gaugekit.reference.single_cache_attention import single_cache_attention as reference
from helpers import assert_accurate

attention_rows = torch.ops.gaugekit.single_cache_attention_rows
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ON_HOPPER = pytest.mark.usefixtures("hopper")


@pytest.fixture
def hopper():
    """Asked as a test runs, not while tests are collected: a rehearsal collects them without a card."""
    if torch.cuda.get_device_capability() != choice.CAPABILITY:
        pytest.skip("its copies are those of compute capability 9.0")


NAMES = ("alpha", "beta", "gamma", "key_gain", "cos", "sin", "causal", "window", "query_start", "key_lengths",
         "block_table")  # fmt: skip
# batch, heads, groups, queries, rows, channels; slices, terms, pairs that turn; the mask
CASES = {
    "slices with terms": ((2, 4, 1, 1, 1300, 64), True, "abg", 0, {"key_lengths": [1300, 700]}),
    "whole rows": ((2, 16, 1, 1, 600, 2048), False, "", 0, {"key_lengths": [600, 33]}),
    "wide slices with terms": ((2, 16, 1, 1, 600, 2048), True, "abg", 0, {"key_lengths": [0, 600]}),
    "a narrower width": ((1, 12, 1, 1, 530, 768), True, "ag", 0, {}),
    "whole rows with terms": ((1, 12, 1, 1, 100, 768), False, "abg", 0, {}),
    "several queries": ((2, 2, 1, 4, 700, 160), True, "abg", 0, {"window": 70, "query_start": [-2, 690]}),
    "every row": ((2, 2, 1, 2, 80, 64), True, "g", 0, {"causal": False, "key_lengths": [80, 0]}),
    "turned keys": ((2, 16, 2, 1, 1100, 512), False, "", 64, {"key_lengths": [1100, 513]}),
    "turned keys with terms": ((1, 4, 2, 3, 600, 64), False, "abg", 32, {"window": 100}),
}


def operands(name, dtype, device="cpu"):
    (batch, heads, groups, queries, rows, width), slices, terms, pairs, mask = CASES[name]
    q = torch.randn(batch, heads, queries, width, device=device).to(dtype)
    cache = (torch.randn(batch, groups, rows, width, device=device) + 0.25).to(dtype)
    options = {n: torch.tensor(x, device=device) if isinstance(x, list) else x for n, x in mask.items()}
    options |= {n: torch.randn(heads, device=device) for n in ("alpha", "beta", "gamma") if n[0] in terms}
    if pairs:
        angle = torch.randn(rows, pairs, device=device)
        gain = torch.randn(width, device=device)
        options |= {"cos": angle.cos(), "sin": angle.sin(), "key_gain": gain}
    return q, cache, slices, options


def given(q, cache, slices, options, scale=0.1):
    """As the operator is called: the public function has said where the queries begin."""
    o = {"causal": True, **options}
    if o["causal"] and o.get("query_start") is None and o.get("key_lengths") is not None:
        o["query_start"] = o["key_lengths"] - q.shape[2]
    return (q, cache, slices, *(o.get(name) for name in NAMES), scale)


def call(q, cache, slices, options):
    return attention_rows(*cuda.dense(*given(q, cache, slices, options)))


def assert_right(q, cache, slices, options, out):
    here = {n: x.cpu() if torch.is_tensor(x) else x for n, x in options.items()}
    wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in here.items()}
    q, cache = q.cpu(), cache.cpu()
    exact = reference(q.double(), cache.double(), slices=slices, scale=0.1, **wide)
    assert_accurate(out.cpu(), exact, reference(q, cache, slices=slices, scale=0.1, **here))


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_composition_and_choice(name, dtype):
    q, cache, slices, options = operands(name, dtype)
    assert choice.refusal(*given(q, cache, slices, options)) is None
    assert_right(q, cache, slices, options, call(q, cache, slices, options))


@pytest.mark.parametrize("name", ["slices with terms", "turned keys with terms"])
def test_schema(name):
    torch.library.opcheck(attention_rows.default, given(*operands(name, torch.bfloat16)))


def test_what_goes_to_triton():
    def refused(*, like="slices with terms", dtype=torch.bfloat16, **changes):
        q, cache, slices, options = operands(like, dtype)
        options |= {name: x for name, x in changes.items() if name in NAMES}
        q, cache = changes.get("q", q), changes.get("cache", cache)
        return choice.refusal(*given(q, cache, changes.get("slices", slices), options))

    def random(*shape):
        return torch.randn(*shape).bfloat16()

    assert refused() is None
    assert "float32" in refused(dtype=torch.float32)
    assert "nothing" in refused(q=random(2, 4, 0, 64))
    assert "multiple of 32" in refused(q=random(2, 4, 1, 48), cache=random(2, 1, 9, 48))
    assert "2048 channels" in refused(q=random(2, 4, 1, 2080), cache=random(2, 1, 9, 2080), slices=False)
    assert "16 heads" in refused(q=random(2, 4, 5, 64))
    assert refused(like="whole rows") is None
    assert "no query row" in refused(like="whole rows", gamma=torch.ones(16))
    sixteen = {"q": random(2, 1, 9, 64), "slices": False, "gamma": None}
    assert refused(**sixteen) is None
    assert "over slices" in refused(
        like="turned keys", slices=True, gamma=torch.ones(16), q=random(2, 16, 1, 512)
    )
    assert "slices of a width" in refused(q=random(2, 4, 1, 32), cache=random(2, 1, 9, 32))
    angle = torch.ones(1300, 8)
    assert "pairs" in refused(like="turned keys", cos=angle, sin=angle)
    angle = torch.ones(1300, 16)
    wide = {"q": random(2, 2, 1, 544), "cache": random(2, 1, 9, 544)}
    assert "turned keys of more" in refused(like="turned keys", cos=angle, sin=angle, **wide)
    assert "lie" in refused(cache=random(2, 1, 1300, 65)[..., 1:])
    assert "lie" in refused(cache=random(2, 1, 1300, 68)[..., :64])
    assert "lie" in refused(q=random(2, 4, 1, 128)[..., ::2])
    assert "too many" in refused(block_table=torch.zeros(1, 1, dtype=torch.int32).expand(2, 1 << 20))


def test_it_is_asked_for():
    assert choice.asked_core() == "triton"
    with use_core("cuda"):
        assert choice.asked_core() == "cuda"
        with use_core("triton"):
            assert choice.asked_core() == "triton"
        assert choice.asked_core() == "cuda"
    assert choice.asked_core() == "triton"
    with pytest.raises(ValueError, match="core: expected 'triton' or 'cuda', got 'fused'"), use_core("fused"):
        pass


def test_gains_and_tables_are_brought_to_what_the_binary_reads():
    q, cache, slices, options = operands("turned keys with terms", torch.bfloat16)
    options |= {"alpha": torch.randn(8).bfloat16()[::2], "cos": torch.randn(600, 33)[:, 1:]}
    found = cuda.dense(*given(q, cache, slices, options))
    assert found[0] is q and found[1] is cache and found[3].dtype == torch.float32
    assert torch.equal(found[3], options["alpha"].float()) and torch.equal(found[7], options["cos"])
    dense = [x for x in found[2:] if torch.is_tensor(x)]
    assert all(x.is_contiguous() and x.data_ptr() % cuda.TABLE_BYTES == 0 for x in dense)


@pytest.mark.gpu
@ON_HOPPER
def test_the_binary_has_it():
    assert _library.implementation("single_cache_attention_rows", "CUDA")


@pytest.mark.gpu
@ON_HOPPER
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name, dtype):
    """single_cache_attention_rows; its bits again from the public function, where it is asked for."""
    q, cache, slices, options = operands(name, dtype, "cuda")
    out = torch.ops.gaugekit.single_cache_attention_rows(*cuda.dense(*given(q, cache, slices, options)))
    assert_right(q, cache, slices, options, out)
    with use_core("cuda"):
        again = gk.single_cache_attention(q, cache, slices=slices, scale=0.1, **options)
    assert torch.equal(again, out) and again.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@ON_HOPPER
@DTYPES
def test_pages_and_views_give_the_same_bits(dtype):
    """Rows that no query sees, and entries of pages that hold none, may be anything."""
    q, cache, slices, options = operands("slices with terms", dtype, "cuda")
    expected = call(q, cache, slices, options)
    cache[1, :, 700:] = float("nan")
    assert torch.equal(call(q, cache, slices, options), expected)
    order = torch.randperm(260, device="cuda").view(2, 130)
    pool = torch.empty(260, 1, 10, 64, dtype=dtype, device="cuda")
    for b in range(2):
        pool[order[b]] = cache[b].unflatten(1, (130, 10)).transpose(0, 1)
    order[1, 70:] = 1 << 30
    assert torch.equal(call(q, pool, slices, {**options, "block_table": order.int()}), expected)
    wide = torch.empty(2, 1300, 3, 64, dtype=dtype, device="cuda")
    wide[:, :, 1] = cache[:, 0]
    assert torch.equal(call(q, wide[:, :, 1:2].transpose(1, 2), slices, options), expected)


@pytest.mark.gpu
@ON_HOPPER
def test_calls_repeat_to_the_bit_in_a_graph_too():
    q, cache, slices, options = operands("turned keys", torch.bfloat16, "cuda")
    here = cuda.dense(*given(q, cache, slices, options))
    expected = attention_rows(*here)
    alone = cuda.dense(
        *given(q[:1], cache[:1], slices, {**options, "key_lengths": options["key_lengths"][:1]})
    )
    assert torch.equal(attention_rows(*alone), expected[:1])  # whatever the rest of the batch
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_rows(*here)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, attention_rows(*here))


@pytest.mark.gpu
@ON_HOPPER
def test_what_it_does_not_take_is_refused_by_the_binary_and_goes_to_triton():
    q, cache, slices, options = operands("slices with terms", torch.float32, "cuda")
    with pytest.raises(RuntimeError, match="q: expected bfloat16 or float16"):
        call(q, cache, slices, options)
    expected = gk.single_cache_attention(q, cache, slices=slices, scale=0.1, **options)
    with use_core("cuda"):
        assert torch.equal(gk.single_cache_attention(q, cache, slices=slices, scale=0.1, **options), expected)
