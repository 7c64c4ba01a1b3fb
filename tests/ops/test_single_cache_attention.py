"""Attention from one cache: against the reference and against keys and values, in every layout, with every option."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gaugekit as gk
from gaugekit._library import implementation
from gaugekit.ops.single_cache_attention.operator import composition
from gaugekit.reference.shaped_attention import shaped_attention
from gaugekit.reference.single_cache_attention import single_cache_attention as reference
from helpers import assert_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.gaugekit.single_cache_attention.default
# batch, heads, groups, queries, rows of the cache, channels
SIZES = {"one": (2, 4, 1, 1, 9, 12), "chunk": (2, 4, 2, 3, 11, 8), "odd": (1, 3, 1, 2, 7, 9)}
MASKS = {
    "last": {},
    "lengths": {"key_lengths": torch.tensor([5, 7])},
    "starts": {"query_start": torch.tensor([-1, 4]), "key_lengths": torch.tensor([3, 6]), "window": 3},
    "open": {"causal": False, "key_lengths": torch.tensor([4, 6])},
}


def make(size, dtype=torch.float64, terms=True, rotary=False, mask="last"):
    batch, heads, groups, queries, rows, width = SIZES[size]
    q, cache = torch.randn(batch, heads, queries, width), torch.randn(batch, groups, rows, width)
    options = {name: x[:batch] if torch.is_tensor(x) else x for name, x in MASKS[mask].items()}
    if terms:
        names = ("beta", "gamma") if mask == "open" else ("alpha", "beta", "gamma")
        options |= {name: torch.randn(heads).to(dtype) for name in names}
    if rotary:
        angle = torch.randn(rows + 2, width // 4)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        options |= {"cos": angle.cos().to(kind), "sin": angle.sin().to(kind), "key_gain": torch.randn(width)}
    return q.to(dtype), cache.to(dtype), options


def wide(options):
    return {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}


def operands(q, cache, options, slices=False, scale=0.3):
    """As the public function gives them to the operator."""
    o = {"causal": True, **options}
    names = ("alpha", "beta", "gamma", "key_gain", "cos", "sin", "causal", "window", "query_start", "key_lengths",
             "block_table")  # fmt: skip
    return (q, cache, slices, *(o.get(name) for name in names), scale)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_matches_the_reference(size, dtype, mask):
    for slices in (False, True):
        for rotary in (False, True) if SIZES[size][5] % 2 == 0 else (False,):
            q, cache, options = make(size, dtype, rotary=rotary, mask=mask)
            exact = reference(q.double(), cache.double(), slices=slices, scale=0.3, **wide(options))
            naive = reference(q, cache, slices=slices, scale=0.3, **options)
            out = gk.single_cache_attention(q, cache, slices=slices, scale=0.3, **options)
            assert_accurate(out, exact, naive)
            assert out.transpose(1, 2).is_contiguous()


def test_long_caches():
    """More rows than one block and one split of them, more queries than one block, widths that fill registers."""
    batch, heads, queries, rows, width = 2, 3, 70, 1100, 96
    q, cache = torch.randn(batch, heads, queries, width), torch.randn(batch, rows, width)
    options = {"scale": 0.1, "slices": True, "gamma": torch.randn(3), "alpha": torch.randn(3)}
    options["key_lengths"] = torch.tensor([1100, 531])
    for dtype in (torch.float32, torch.bfloat16):
        given = q.to(dtype), cache.to(dtype)
        exact = reference(
            *(x.double()[:, None] if x.dim() == 3 else x.double() for x in given), **wide(options)
        )
        naive = reference(given[0], given[1][:, None], **options)
        assert_accurate(gk.single_cache_attention(*given, **options), exact, naive)


def test_a_layers_input_stands_for_its_keys_and_values():
    """Blocks without W_V and W_O: values are slices of x; multi-head attention: W_V follows the weighted sum."""
    batch, tokens, heads, width = 2, 13, 3, 4
    x, q = torch.randn(batch, tokens, 12, dtype=torch.float64), torch.randn(batch, heads, 2, width).double()
    key, value = torch.randn(heads, 12, width).double(), torch.randn(heads, 12, width).double()
    gains = {name: torch.randn(heads).double() for name in ("alpha", "beta", "gamma")}
    k = torch.einsum("bsd,hdk->bhsk", x, key)
    absorbed = torch.einsum("bhtk,hdk->bhtd", q, key)
    shaped = shaped_attention(
        q, k, x.unflatten(2, (heads, width)).transpose(1, 2), causal=True, scale=0.5, **gains
    )
    out = gk.single_cache_attention(absorbed, x, slices=True, scale=0.5, **gains)
    torch.testing.assert_close(out, shaped)
    v = torch.einsum("bsd,hdv->bhsv", x, value)
    plain = shaped_attention(q, k, v, causal=True, scale=0.5, **gains)
    sums = gk.single_cache_attention(absorbed, x, scale=0.5, **gains)
    torch.testing.assert_close(torch.einsum("bhtd,hdv->bhtv", sums, value), plain)


def test_gemma_4_attends_from_its_values_alone():
    """A global layer of Gemma 4 (keys are values, scaled and a quarter of them rotated) against its own module."""
    gemma = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    config = gemma.Gemma4TextConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=2, head_dim=16,
        global_head_dim=32, num_hidden_layers=1, layer_types=["full_attention"], attention_k_eq_v=True,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, vocab_size=16,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = gemma.Gemma4TextAttention(config, 0).eval().double()
    torch.nn.init.normal_(layer.k_norm.weight)
    torch.nn.init.normal_(layer.q_norm.weight)
    x, positions = torch.randn(2, 10, 48, dtype=torch.float64), torch.arange(10)[None]
    tables = gemma.Gemma4TextRotaryEmbedding(config)(x, positions, "full_attention")
    causal = torch.full((10, 10), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    rotated = 4  # a quarter of the 16 pairs; the rest have the angle 0
    cos, sin = (table[0, :, :rotated] for table in tables)
    assert layer.v_proj is None and not tables[1][0, :, rotated:16].any()
    with torch.no_grad():
        expected = layer(x, tables, causal, {})[0][:, -3:]
        q = layer.q_norm(layer.q_proj(x).unflatten(2, (4, 32)))
        q = gemma.apply_rotary_pos_emb(q, *tables, unsqueeze_dim=2).transpose(1, 2)[:, :, -3:]
        v = layer.v_norm(layer.k_proj(x).unflatten(2, (2, 32))).transpose(1, 2)
        gain = layer.k_norm.weight
        out = gk.single_cache_attention(q, v, cos=cos, sin=sin, key_gain=gain, scale=layer.scaling)
        out = layer.o_proj(out.transpose(1, 2).flatten(2))
    naive = expected + (expected.float().double() - expected)  # its norms are computed in float32
    assert_accurate(out.float(), expected, naive.float(), ulps=64)


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page", [1, 3, 16])
def test_pages(page, dtype, slices):
    """Pages in any order give the bits of rows in one piece; entries past a sequence's rows are not looked at."""
    lengths = torch.tensor([50, 33])
    count, width = -(-64 // page), 32 if page == 16 else 24  # rows that fill registers, and rows that do not
    q, cache = torch.randn(2, 4, 2, width).to(dtype), torch.randn(2, 1, count * page, width).to(dtype)
    table = torch.randperm(2 * count).view(2, count).int()
    pool = torch.full((2 * count, 1, page, width), float("nan")).to(dtype)
    for b, length in enumerate(lengths.tolist()):
        for j in range(length):
            pool[table[b, j // page], 0, j % page] = cache[b, 0, j]
        table[b, -(-length // page) :] = 1 << 30
    options = {"scale": 0.2, "slices": slices, "gamma": 0.5, "alpha": 0.25}
    expected = gk.single_cache_attention(q, cache, key_lengths=lengths, **options)
    out = gk.single_cache_attention(q, pool, key_lengths=lengths, block_table=table, **options)
    assert torch.equal(out, expected)
    assert torch.equal(
        gk.single_cache_attention(q, pool[:, 0], key_lengths=lengths, block_table=table, **options), expected
    )


def test_what_nobody_sees_may_hold_anything():
    """A buffer for later rows, and a sequence of no rows at all."""
    for dtype in DTYPES:
        q, cache, options = make("one", dtype, terms=True, rotary=True)
        cache[0, :, 5:] = float("nan")
        cache[1] = float("inf")
        out = gk.single_cache_attention(q, cache, scale=0.3, **options, key_lengths=[5, 0])
        assert torch.isfinite(out).all() and out[0].any() and not out[1].any()
        cache = torch.full((2, 100, 32), float("nan"), dtype=dtype)
        cache[0, :50] = 1.0
        out = gk.single_cache_attention(
            torch.ones(2, 2, 1, 32, dtype=dtype),
            cache,
            slices=True,
            scale=0.3,
            gamma=0.5,
            key_lengths=[50, 0],
        )
        torch.testing.assert_close(out[0], torch.full_like(out[0], 0.5))
        assert not out[1].any()


@pytest.mark.parametrize("learns", [False, True])
def test_what_lies_before_a_window_may_hold_anything(learns):
    """In the block in which the window begins, too; a query of a sequence without rows does not widen it."""
    for dtype, rotary, width in itertools.product((torch.float32, torch.bfloat16), (False, True), (32, 24)):
        cos = torch.rand(64, 8) if rotary else None
        turn = {"cos": cos, "sin": (1 - cos**2).sqrt()} if rotary else {}
        q = torch.randn(2, 2, 1, width).to(dtype).requires_grad_(learns)
        cache = torch.randn(2, 1, 64, width).to(dtype)
        options = {"scale": 0.3, "window": 8, "key_lengths": [64, 0], "gamma": 0.5, **turn}
        expected = gk.single_cache_attention(q, cache, **options)
        cache[0, :, :56] = float("nan")
        assert torch.equal(gk.single_cache_attention(q, cache, **options), expected)


def test_pages_before_a_window_are_not_looked_up():
    q, cache = torch.randn(1, 1, 1, 32), torch.randn(8, 1, 16, 32)
    for dtype in (torch.float32, torch.bfloat16):
        tables = torch.tensor([[0, 1, 2, 3]]).int(), torch.tensor([[2**30, 2**30, 2, 3]]).int()

        def attend(table, dtype=dtype):
            where = (True, 8, torch.tensor([40]), torch.tensor([41]), table)
            return OP(q.to(dtype), cache.to(dtype), False, *[None] * 6, *where, 0.3)

        found, other = map(attend, tables)
        assert torch.equal(found, other)


def test_strides():
    """Views are read where they lie: [B, S, G, C] in memory, every second row, every second channel."""
    q, cache, options = make("chunk", torch.float32, rotary=True)
    expected = gk.single_cache_attention(q, cache, scale=0.3, **options)
    views = (
        cache.transpose(1, 2).contiguous().transpose(1, 2),
        cache.repeat_interleave(2, 2)[:, :, ::2],
        cache.repeat_interleave(2, 3)[..., ::2],
    )
    for view in views:
        assert not view.is_contiguous()
        assert torch.equal(gk.single_cache_attention(q, view, scale=0.3, **options), expected)
    torch.library.opcheck(OP, operands(q, views[0], options))
    turned = q.mT.contiguous().mT
    assert torch.equal(gk.single_cache_attention(turned, cache, scale=0.3, **options), expected)


def test_identities():
    """α = 1 alone is the row itself, and queries of zero with α = β = γ = 1 too: A = C."""
    for dtype in DTYPES:
        q, cache, _ = make("one", dtype)
        own = cache[:, :, -1].unflatten(2, (4, 3)).flatten(1, 2)[:, :, None]
        alone = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}
        assert torch.equal(gk.single_cache_attention(q, cache, slices=True, scale=0.3, **alone), own)
        ones = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0}
        out = gk.single_cache_attention(torch.zeros_like(q), cache, slices=True, scale=0.3, **ones)
        assert_accurate(out, own.double(), own)


def test_gradcheck():
    """Where a gradient is asked for, the composition runs under autograd."""
    q, cache, options = make("chunk", rotary=True, mask="lengths")
    names = ["alpha", "beta", "gamma", "key_gain"]
    options["key_gain"] = options["key_gain"].double()
    leaves = [x.requires_grad_() for x in (q, cache, *(options.pop(name) for name in names))]
    for slices in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, cache, *x, slices=slices: gk.single_cache_attention(
                q, cache, slices=slices, scale=0.4, **dict(zip(names, x, strict=True)), **options
            ),
            leaves,
            fast_mode=True,
        )


@pytest.mark.parametrize("mask", MASKS)
def test_opcheck(mask):
    cases = [("one", False, True, torch.float32), ("chunk", True, False, torch.bfloat16)]
    for size, rotary, terms, dtype in cases + [("odd", False, False, torch.float64)] * (mask == "last"):
        q, cache, options = make(size, dtype, terms, rotary, mask)
        torch.library.opcheck(OP, operands(q, cache, options, slices=not rotary))


def test_opcheck_of_pages():
    table = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    q, cache, options = make("one", torch.float16)
    torch.library.opcheck(OP, operands(q, cache, {**options, "block_table": table}))


def test_empty():
    q, cache, options = make("one", torch.float32)
    assert gk.single_cache_attention(q[:, :, :0], cache, scale=1.0, **options).shape == (2, 4, 0, 12)
    assert gk.single_cache_attention(q[:0], cache[:0], slices=True, scale=1.0, **options).shape == (
        0,
        4,
        1,
        3,
    )
    out = gk.single_cache_attention(q, cache[:, :, :0], slices=True, scale=1.0, **options)
    assert out.shape == (2, 4, 1, 3) and not out.any()


@pytest.mark.parametrize("public, grad", [(True, True), (True, False), (False, False)])
def test_compile(public, grad):
    counter = CompileCounterWithBackend("aot_eager")
    q, cache, options = make("chunk", torch.float32, rotary=True)

    def run(q, cache):
        if public:
            return gk.single_cache_attention(q, cache, scale=0.4, **options)
        return OP(*operands(q, cache, options, scale=0.4))

    q.requires_grad_(grad)
    out = torch.compile(run, fullgraph=True, backend=counter)(q, cache)
    assert counter.frame_count == 1
    torch.testing.assert_close(out, run(q, cache))
    if grad:
        out.sum().backward()
        assert q.grad.abs().sum() > 0


def test_the_composition_gives_what_the_kernel_gives():
    for size in SIZES:
        for dtype in DTYPES:
            q, cache, options = make(size, dtype)
            exact = reference(q.double(), cache.double(), scale=0.3, **wide(options))
            naive = reference(q, cache, scale=0.3, **options)
            assert_accurate(composition(*operands(q, cache, options)), exact, naive)


def test_under_autocast_the_given_dtype_counts():
    q, cache, options = make("one", torch.float32)
    expected = gk.single_cache_attention(q, cache, scale=0.3, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gk.single_cache_attention(q, cache, scale=0.3, **options), expected)
        with_gradient = gk.single_cache_attention(q.requires_grad_(), cache, scale=0.3, **options)
    torch.testing.assert_close(with_gradient, expected)


def test_bad_input():
    q, cache, options = make("one", rotary=True)
    cos, sin, gain = options["cos"], options["sin"], options["key_gain"]
    turn = {"cos": cos, "sin": sin}
    table = torch.zeros(2, 2, dtype=torch.int32)
    for changes, message in (
        ({"q": q[0]}, r"q: expected \[B, H, T, C\]"),
        ({"q": q.long()}, "q: expected .* float32"),
        ({"cache": [1.0]}, "cache: expected a torch.Tensor"),
        ({"cache": cache[..., :-1]}, r"cache: expected \[B, G, S, C\], B = 2"),
        ({"cache": cache[:1]}, "cache: expected .*B = 2"),
        ({"cache": cache.repeat(1, 3, 1, 1)}, "G dividing H = 4"),
        ({"cache": cache.float()}, "cache: expected torch.float64"),
        ({"q": q[:, :, :, :10], "cache": cache[..., :10], "slices": True}, "slices: expected C divisible by"),
        ({"cos": cos}, "sin: expected beside cos"),
        ({"key_gain": gain}, "key_gain: expected beside cos and sin"),
        ({**turn, "key_gain": gain[:-1]}, r"key_gain: expected \[C\] = \[12\]"),
        ({**turn, "cos": cos[:5]}, "cos: expected .* P at least 9"),
        ({**turn, "sin": sin.float()}, "sin: expected .* of torch.float64"),
        ({"cos": torch.zeros(9, 7).double(), "sin": torch.zeros(9, 7).double()}, "R at most"),
        ({"beta": torch.ones(3)}, "beta"),
        ({"window": 0}, "window"),
        ({"key_lengths": [3, 10]}, "key_lengths: expected values in 0..S = 9"),
        ({"key_lengths": [3]}, "key_lengths"),
        ({"causal": False, "alpha": 1.0}, "alpha, lam: expected T = S without causal"),
        ({"block_table": table.long()}, "block_table: expected int32"),
        ({"block_table": table[:1]}, r"block_table: expected int32 \[B, P\], B = 2"),
        ({"block_table": table + 2}, "block_table: expected pages 0 to 1, got"),
        ({"block_table": table - 1}, "block_table: expected pages 0 to 1, got"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.single_cache_attention(**{"q": q, "cache": cache, "scale": 1.0, **changes})


@pytest.mark.skipif(
    not implementation("single_cache_attention"), reason="torch's products promise no such thing"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_do_not_change_a_bit(dtype):
    """Splits have a fixed length and are added up in their order; a query's sums do not depend on those beside it."""
    q, cache = torch.randn(3, 4, 5, 40).to(dtype), torch.randn(3, 1, 1200, 40).to(dtype)
    options = {"scale": 0.2, "slices": True, "gamma": torch.randn(4), "alpha": 0.5}
    lengths = torch.tensor([1200, 700, 3])
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(gk.single_cache_attention(q, cache, key_lengths=lengths, **options))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for b, length in enumerate(lengths.tolist()):
        for t in range(5):
            start = torch.tensor([length - 5 + t])
            alone = gk.single_cache_attention(
                q[b : b + 1, :, t : t + 1], cache[b : b + 1, :, :length], query_start=start, **options
            )
            assert torch.equal(alone[0, :, 0], results[0][b, :, t])
