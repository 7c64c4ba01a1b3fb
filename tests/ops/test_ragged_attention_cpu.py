"""The C++ kernel of ragged attention: whole and cut blocks of 48, every mask, every instruction set, any threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gaugekit as gk
from gaugekit import _library
from gaugekit.ops import processor
from gaugekit.ops.shaped_attention import choice, plan, use_core
from gaugekit.reference.ragged_attention import ragged_attention as reference
from helpers import assert_accurate
from warm import python

pytestmark = pytest.mark.skipif(not _library.implementation("ragged_attention"), reason="no C++ binary")
TOKENS, WIDTH, RANKS, SCALE = 101, 40, [5, 48, 16], 0.3  # a width and ranks that fill registers and do not
MASKS = {
    "none": {},
    "causal": {"causal": True},
    "lengths": {"key_lengths": torch.tensor([101, 49]), "window": 20},
    "all": {"causal": True, "window": 30, "query_start": torch.tensor([-1, 2]), "key_lengths": torch.tensor([100, 61])},
    "packed": {"causal": True, "cu_seqlens": torch.tensor([0, 50, 50, TOKENS], dtype=torch.int32)},
}  # fmt: skip
NAMES = ("causal", "window", "query_start", "key_lengths", "cu_seqlens")


def operands(mask, dtype=torch.float32, repeats=2):
    batch = 1 if mask == "packed" else 2
    shapes = [
        (batch, TOKENS, sum(RANKS) * repeats),
        (batch, TOKENS, sum(RANKS)),
        (batch, len(RANKS), TOKENS, WIDTH),
    ]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def both_ways(attention, inputs, weight):
    out = attention(*inputs)
    return out, *torch.autograd.grad(out, inputs, weight.to(out.dtype))


def kernel(mask):
    given = {"causal": False, **MASKS[mask]}
    options = [given.get(name) for name in NAMES]
    return lambda q, k, v: torch.ops.gaugekit.ragged_attention(q, k, v, RANKS, *options, SCALE)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_forward_and_backward(mask, dtype):
    inputs = operands(mask, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def naive(q, k, v):
        return reference(q, k, v, RANKS, scale=SCALE, **MASKS[mask])

    weight = torch.randn(inputs[0].shape[0], 2 * len(RANKS), TOKENS, WIDTH)
    found, plain = both_ways(kernel(mask), inputs, weight), both_ways(naive, inputs, weight)
    for x, y, z in zip(found, both_ways(naive, exact, weight), plain, strict=True):
        assert_accurate(x, y, z, ulps=64)


def test_one_query_head_a_key_head_and_views_written_in_place():
    """Gradients of keys and values are then written at once, not as parts to be added."""
    q, k, _ = operands("causal", repeats=1)
    heads = torch.randn(2, TOKENS, len(RANKS), WIDTH).transpose(1, 2).requires_grad_()
    weight = torch.randn(2, len(RANKS), TOKENS, WIDTH)
    options = {"scale": SCALE, "causal": True}
    found = both_ways(kernel("causal"), (q, k, heads), weight)
    plain = both_ways(lambda *x: reference(*x, RANKS, **options), (q, k, heads), weight)
    exact = [x.detach().double().requires_grad_() for x in (q, k, heads)]
    wide = both_ways(lambda *x: reference(*x, RANKS, **options), exact, weight)
    for x, y, z in zip(found, wide, plain, strict=True):
        assert_accurate(x, y, z, ulps=64)
    assert found[3].stride() == heads.stride()


def test_the_same_bits_on_any_number_of_threads():
    inputs, before, found = operands("causal"), torch.get_num_threads(), []
    weight = torch.randn(2, 2 * len(RANKS), TOKENS, WIDTH)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both_ways(kernel("causal"), inputs, weight))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))


NARROWER = """
import os, torch, test_ragged_attention_cpu as t
for level in ("default", "avx2"):  # read once a process, when a kernel first runs: each level has a child of its own
    if not (child := os.fork()):
        os.environ["ATEN_CPU_CAPABILITY"] = level
        torch.manual_seed(0)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            t.test_forward_and_backward("all", dtype)
        assert torch.backends.cpu.get_cpu_capability().lower() == level
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, level
"""


def test_narrower_instruction_sets():
    """The tests above ran on the widest; torch's own switch names the others."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    done = subprocess.run([*python(), "-c", NARROWER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_array_of_all_scores():
    """Scores would be 64 MiB; what is held grows with the number of tokens."""
    peak = Path("/proc/self/clear_refs")
    if not os.access(peak, os.W_OK):
        pytest.skip("the system does not tell the peak of this process")

    def held(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) >> 10

    q, k, v = (torch.randn(1, 4096, 8, requires_grad=True) for _ in range(3))
    peak.write_text("5")
    before = held("VmRSS")
    with use_core("ragged"):
        out = gk.ragged_attention(q, k, v[:, None], [8], scale=1.0, causal=True)
    out.sum().backward()
    assert out.shape == (1, 1, 4096, 8) and held("VmHWM") - before < 24


# Whether ours is taken for (T, S, K, V), plain and under a causal mask of as many queries as keys.
BOTH, NEITHER = (True, True), (False, False)
TAKEN = {
    ("avx512", torch.float32): {(1024, 1024, 48, 64): BOTH, (1024, 1024, 49, 64): NEITHER, (31, 99, 16, 64): NEITHER},
    ("avx2", torch.float16): {(32, 32, 64, 64): BOTH, (1024, 1024, 65, 64): NEITHER, (1, 999, 16, 64): NEITHER},
    ("native", torch.float32): {(32, 32, 48, 64): BOTH},
    ("native", torch.bfloat16): {(1024, 1024, 16, 64): NEITHER},
    ("pairs", torch.float32): {
        (96, 96, 32, 64): BOTH, (95, 95, 32, 64): NEITHER, (128, 128, 64, 64): (False, True),
        (1024, 1024, 65, 64): NEITHER,
    },
    ("pairs", torch.float64): {(1024, 1024, 16, 64): NEITHER},
    ("pairs", torch.bfloat16): {
        (40, 40, 64, 64): BOTH, (39, 39, 64, 64): NEITHER, (1, 128, 64, 64): BOTH, (1, 127, 64, 64): NEITHER,
        (64, 64, 256, 64): BOTH, (64, 64, 257, 257): NEITHER, (64, 64, 65, 16): NEITHER,
    },
    ("pairs", torch.float16): {(48, 48, 64, 64): BOTH, (47, 999, 64, 64): NEITHER},
    (None, torch.float32): {(1024, 1024, 16, 64): NEITHER},
}  # fmt: skip


@pytest.mark.parametrize("kind, dtype", TAKEN)
def test_the_table_takes_it_where_it_was_faster(kind, dtype, monkeypatch):
    monkeypatch.setattr(choice, "_kind", lambda: kind)
    for sizes, expected in TAKEN[kind, dtype].items():
        found = tuple(choice.cpu_core(dtype, *sizes, causal) == "ragged" for causal in (False, True))
        assert found == expected, sizes


@pytest.mark.parametrize(
    "capability, own, kind",
    [
        ("AVX2", (), "avx2"),
        ("AVX512", (), "avx512"),
        ("AVX512", tuple(processor.PAIRS), "pairs"),
        ("AVX512", ("avx512_bf16",), "native"),  # Cooper Lake has no VBMI2, which our products ask for
        ("AVX512", tuple(processor.PAIRS - {"vpclmulqdq"}), "native"),  # as a hypervisor may hide it
        ("AVX512", (*processor.PAIRS, "amx_bf16", "amx_tile"), "native"),
        ("AVX2", tuple(processor.PAIRS), "native"),  # ATEN_CPU_CAPABILITY
        ("DEFAULT", (), None),
    ],
)
def test_kinds_of_processors(capability, own, kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(own, True))
    monkeypatch.setattr(processor, "flags", lambda: frozenset(own))
    assert choice._processor.__wrapped__() == kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shaped_attention_on_it(dtype):
    q, k, v = (torch.randn(1, 2, 128, width).to(dtype) for width in (8, 8, 16))
    taken = choice.cpu_core(dtype, 128, 128, 8, 16, True)
    assert plan(q, k, v, causal=True).core.startswith(taken)
    gains = {"alpha": torch.randn(2), "gamma": torch.randn(2)}
    with use_core("torch"):
        padded = gk.shaped_attention(q, k, v, **gains, causal=True)
    with use_core("ragged"):
        found = gk.shaped_attention(q, k, v, **gains, causal=True)
    assert_accurate(found, padded.double(), padded, ulps=8)
    with torch.autocast("cpu"), use_core("ragged"):
        assert gk.shaped_attention(q.float(), k.float(), v.float(), causal=True).dtype == torch.bfloat16


@pytest.mark.parametrize("heads", [3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_queries_on_a_cache_that_holds_head_after_head(dtype, heads):
    """Its heads are then sequences, so that no key is copied: the same bits as where a row holds all heads."""
    options = {
        "query_start": torch.tensor([95, 40]),
        "key_lengths": torch.tensor([100, 43]),
        "causal": True,
        "window": 77,
    }
    options = options | {"gamma": torch.randn(heads)}
    rows = [torch.randn(2, t, h, w).to(dtype) for t, h, w in ((5, heads, 24), (120, 3, 24), (120, 3, 16))]
    rows = [x.transpose(1, 2).requires_grad_() for x in rows]
    cache = [x.detach().contiguous().requires_grad_() for x in rows]
    slices = [cache[0], *(torch.cat([x, x], 2)[:, :, :120] for x in cache[1:])]
    weight = torch.randn(2, heads, 5, 16)
    with use_core("ragged"):
        expected = both_ways(lambda *x: gk.shaped_attention(*x, **options), rows, weight)
        for inputs in (cache, slices):
            found = both_ways(lambda *x: gk.shaped_attention(*x, **options), inputs, weight)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
