"""The C++ kernel of attention from one cache: tiles of every height, whole and cut blocks, every instruction set.

On processors with AVX512-BF16 bfloat16 rows are multiplied in pairs; what is said of pairs waits for such a processor,
and elsewhere the same tests hold the other forms.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gaugekit as gk
from gaugekit._library import implementation
from gaugekit.ops import processor
from gaugekit.reference.single_cache_attention import single_cache_attention as reference
from helpers import assert_accurate
from warm import python

pytestmark = pytest.mark.skipif(not implementation("single_cache_attention"), reason="no C++ binary")
PAIRS = torch.backends.cpu.get_cpu_capability() == "AVX512" and processor.flags() >= processor.PAIRS
ROWS = 1003  # two splits, and blocks of which the last is cut at an odd row
# heads, groups, queries, channels, slices, and what else is given
CASES = {
    "slices": (12, 1, 1, 768, True, {}),
    "whole rows": (12, 1, 1, 192, False, {}),
    "odd width": (5, 1, 1, 385, True, {"gamma": 0.5, "alpha": 0.25}),
    "odd slices": (4, 2, 3, 66, True, {"gamma": 0.5, "window": 101}),
    "grouped": (8, 2, 1, 33, False, {"gamma": 0.5}),
    "own rows": (3, 3, 2, 100, False, {"window": 700}),
    "turned": (4, 2, 1, 80, False, {"turned": 23, "gamma": 0.5}),
    "drafted": (6, 1, 9, 48, True, {"gamma": 0.5, "beta": 0.75}),
}


def operands(case, dtype=torch.bfloat16):
    heads, groups, queries, width, slices, given = CASES[case]
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    options = {"scale": width**-0.5, "slices": slices, "key_lengths": torch.tensor([ROWS, 611]), **given}
    if turned := options.pop("turned", None):
        angle = random(ROWS, turned)
        options |= {"cos": angle.cos(), "sin": angle.sin(), "key_gain": random(width)}
    return random(2, heads, queries, width).to(dtype), random(2, groups, ROWS, width).to(dtype), options


def exact_and_naive(q, cache, options):
    """By the reference in float64 and in the cache's dtype; it takes gains as tensors."""
    gains = {n: torch.full((q.shape[1],), x) for n, x in options.items() if n in ("alpha", "beta", "gamma")}
    options = options | gains
    wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    return reference(q.double(), cache.double(), **wide), reference(q, cache, **options)


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        q, cache, options = operands(case, dtype)
        if dtype == torch.float64 and "cos" in options:
            options |= {name: options[name].double() for name in ("cos", "sin")}
        out = gk.single_cache_attention(q, cache, **options)
        assert_accurate(out, *exact_and_naive(q, cache, options), ulps=64 if dtype == torch.float64 else 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_number_of_heads_beside_whole_blocks(dtype):
    """Tiles of each height and what they leave over; more rows of queries than of a block, too."""
    for heads in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 60):
        q, cache = torch.randn(1, heads, 1, 36).to(dtype), torch.randn(1, 1, 150, 36).to(dtype)
        out = gk.single_cache_attention(q, cache, scale=0.2)
        assert_accurate(out, *exact_and_naive(q, cache, {"scale": 0.2}))


def errors():
    found = {}
    for case in CASES:
        q, cache, options = operands(case)
        exact = exact_and_naive(q, cache, options)[0]
        error = (gk.single_cache_attention(q, cache, **options).double() - exact).abs()
        found[case] = [error.max().item() / exact.abs().max().item(), error.pow(2).mean().sqrt().item()]
    return found


def errors_without_pairs():
    """Of a process that is told to do without AVX-512: widened to float32."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "ATEN_CPU_CAPABILITY": "avx2",
    }
    script = (
        "import json, test_single_cache_attention_cpu as t; assert not t.PAIRS; print(json.dumps(t.errors()))"
    )
    done = subprocess.run([*python(), "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_pairs_err_little_more_than_numbers_widened_to_float32():
    """Against float64: rounding the result is most of either; rounded weights and turned keys add to it."""
    before = errors_without_pairs()
    for case, (most, usual) in errors().items():
        assert most <= 2 * before[case][0], case
        assert usual <= 2 * before[case][1], case


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_on_any_threads_in_any_batch_and_from_pages(case):
    q, cache, options = operands(case)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gk.single_cache_attention(q, cache, **options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    lengths, count = options.pop("key_lengths").tolist(), q.shape[2]
    for b, length in enumerate(lengths):
        for t in range(count):
            start = torch.tensor([length - count + t])
            alone = gk.single_cache_attention(
                q[b : b + 1, :, t : t + 1], cache[b : b + 1, :, :length], query_start=start, **options
            )
            assert torch.equal(alone[0, :, 0], found[0][b, :, t])
    if "cos" in options:
        options |= {name: torch.nn.functional.pad(options[name], (0, 0, 0, 5)) for name in ("cos", "sin")}
    page = 7
    pages = -(-ROWS // page)
    table = torch.randperm(2 * pages).view(2, pages).int()
    pool = torch.full((2 * pages, cache.shape[1], page, cache.shape[3]), float("nan")).bfloat16()
    padded = torch.nn.functional.pad(cache, (0, 0, 0, pages * page - ROWS), value=float("nan"))
    pool[table.long()] = padded.unflatten(2, (pages, page)).transpose(1, 2)
    paged = gk.single_cache_attention(
        q, pool, block_table=table, key_lengths=torch.tensor(lengths), **options
    )
    assert torch.equal(paged, found[0])


@pytest.mark.parametrize("width", [1, 31, 32, 33, 80])
def test_nothing_behind_a_row_or_a_length_is_taken_up(width):
    """NaN beside each row's channels and behind its sequence's rows, which end at an odd one."""
    q, wide = (
        torch.randn(1, 4, 1, width).bfloat16(),
        torch.full((1, 2, 60, width + 7), float("nan")).bfloat16(),
    )
    wide[:, :, :51, :width] = torch.randn(1, 2, 51, width).bfloat16()
    options = {"scale": 0.3, "gamma": 0.5}
    out = gk.single_cache_attention(q, wide[..., :width], key_lengths=[51], **options)
    own = gk.single_cache_attention(q, wide[:, :, :51, :width].clone(), **options)
    assert torch.isfinite(out).all() and torch.equal(out, own)


def test_subnormal_numbers_count_as_zero_in_products_of_pairs():
    cache = torch.full((1, 1, 5, 8), 1e-39).bfloat16()
    out = gk.single_cache_attention(torch.ones(1, 2, 1, 8).bfloat16(), cache, scale=1.0)
    assert torch.equal(out, torch.zeros_like(out) if PAIRS else cache[:, :, :1].expand_as(out))
