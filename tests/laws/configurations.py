"""Launches that show every kernel in every specialisation, by hand: what ``make test`` compiles, and what is shipped.

Called on a card of meta tensors (card.py), so no number is computed.
"""

from __future__ import annotations

import torch

BF16, FP32, FP16 = "bfloat16", "float32", "float16"


def representatives():
    """(name, launch's arguments): each kernel once in each specialisation, for ``make test``.

    Every type and mask, one and many chunks, one group and several, widths that fill a tile and that do not.
    """
    yield "attention float32 32", {"dtype": FP32, "key_width": 32, "width": 32}
    yield "attention bfloat16 128, window", {"dtype": BF16, "key_width": 128, "width": 128, "window": 100}
    yield "attention float16 32 64, every key, one chunk", {
        "dtype": FP16, "key_width": 32, "width": 64, "causal": False, "terms": True, "rows": 100}  # fmt: skip
    yield "attention bfloat16 64 128, all terms, GQA, packed", {
        "dtype": BF16, "key_width": 64, "width": 128, "groups": 1, "packed": True, "terms": True}  # fmt: skip
    yield "energy bfloat16 64", {"dtype": BF16, "key_width": 64, "width": 64, "energy": True}
    yield "energy float32 32", {"dtype": FP32, "key_width": 32, "width": 32, "energy": True, "causal": False}
    yield "ragged bfloat16 64", {"dtype": BF16, "width": 64, "ranks": [13, 16]}
    yield "combine float32 64", {"dtype": FP32, "width": 64}
    yield "combine bfloat16 128, one chunk", {"dtype": BF16, "width": 128, "rows": 100}
    yield "combine bfloat16 100, window", {"dtype": BF16, "width": 100, "window": 100}
    for batch in (1, 16, 64, 256):
        yield f"packed bfloat16, batch {batch}", {"dtype": BF16, "batch": batch}
    yield "packed float16, float32 rows, batch 16", {"dtype": FP16, "batch": 16, "rows": FP32}
    yield (
        "one cache bfloat16, slices, all terms",
        {"dtype": BF16, "cached": 768, "slices": True, "terms": True},
    )
    yield (
        "one cache bfloat16, turned keys, pages",
        {"dtype": BF16, "cached": 512, "pairs": 64, "pages": 16, "groups": 2},
    )
    yield "one cache float32, window", {"dtype": FP32, "cached": 768, "window": 100, "queries": 4}
    yield (
        "one cache float16, turned keys, many queries",
        {"dtype": FP16, "cached": 128, "pairs": 64, "queries": 8},
    )
    for dtype, width in ((BF16, 64), (FP16, 128), (FP32, 32)):
        yield f"gauge {dtype} {width}", {"dtype": dtype, "projection": width}


def shipped():
    """The same for every entry of the tile tables, for each architecture: heavy, so not in ``make test``."""
    yield from representatives()
    yield "attention bfloat16 64, all terms", {"dtype": BF16, "key_width": 64, "width": 64, "terms": True}
    for dtype in (BF16, FP32):
        for width in (64, 128, 256):
            yield f"attention {dtype} {width}", {"dtype": dtype, "key_width": width, "width": width}
            window = {"dtype": dtype, "width": width, "window": 100}
            yield f"attention {dtype} {width}, window", window | {"key_width": width}
            yield f"combine {dtype} {width}", {"dtype": dtype, "width": width}
            yield f"combine {dtype} {width}, window", window
            if width < 256:
                energy = {"energy": True, "causal": width == 64}
                yield f"energy {dtype} {width}", {"dtype": dtype, "key_width": width, "width": width} | energy
                yield f"ragged {dtype} {width}", {"dtype": dtype, "width": width, "ranks": [13, 32]}
    for key_width, width in ((16, 64), (96, 256)):  # scores of low rank
        yield (
            f"attention bfloat16 {key_width} {width}",
            {"dtype": BF16, "key_width": key_width, "width": width},
        )
    for width in (768, 2048, 4096):
        for queries in (1, 5):
            for dtype in (BF16, FP32):
                sizes = {"dtype": dtype, "cached": width, "queries": queries}
                yield f"one cache {dtype} {width}, {queries} queries", sizes | {"slices": True, "terms": True}
                yield f"one cache {dtype} {width}, {queries} queries, turned", sizes | {"pairs": width // 8}
    for batch in (1, 64, 128, 256):
        yield f"packed float16, batch {batch}", {"dtype": FP16, "batch": batch}
    for batch in (1, 64):
        yield f"packed float8_e5m2, batch {batch}", {"dtype": "float8_e5m2", "rows": BF16, "batch": batch}
    yield "packed bfloat16, batch 128", {"dtype": BF16, "batch": 128}
    for width in (32, 80, 128):
        yield f"gauge {BF16} {width}", {"dtype": BF16, "projection": width}


def launch(batch=0, projection=0, cached=0, **operands) -> None:
    """One configuration: the product with packed weights where ``batch`` says how many rows, a ``projection`` whose
    heads are so wide, decoding from one cache of so many channels (``cached``), else an attention."""
    if batch:
        launch_packed(batch, **operands)
    elif projection:
        launch_gauge(projection, **operands)
    elif cached:
        launch_cache(cached, **operands)
    else:
        launch_attention(**operands)


def launch_packed(batch, dtype, rows=None):
    """The product with packed weights, split over K where the batch is small."""
    from gaugekit.ops.packed_linear.weight import empty_weight
    from gaugekit.triton_kernels.packed_linear import packed_linear

    x = torch.empty(batch, 4096, dtype=getattr(torch, rows or dtype), device="cuda")
    packed = [part.cuda() for part in empty_weight(1024, 4096, getattr(torch, dtype))[:5]]
    packed_linear(x.new_empty(batch, 1024), x, *packed, x.new_empty(1024))


def launch_gauge(width, dtype):
    """A projection whose gauge is fixed, both ways: with a bias and without, with one split of the rows and two."""
    from gaugekit.triton_kernels import gauge_linear as kernels

    for count, biased in ((1024, False), (4096, True)):
        x = torch.empty(count, 768, dtype=getattr(torch, dtype), device="cuda")
        rows = torch.zeros(4, width, dtype=torch.int32).cuda()
        free, out = x.new_empty(4, 768 - width, width), x.new_empty(count, 4 * width)
        kernels.gauge_linear(out, x, free, rows, x.new_empty(4 * width) if biased else None)
        kernels.gauge_linear_backward_x(x, out, free, rows)
        kernels.gauge_linear_backward_free(free, out, x, rows)


def launch_cache(
    width, dtype, slices=False, terms=False, pairs=0, pages=0, groups=1, window=None, queries=1
):  # fmt: skip
    """Two sequences of lengths of their own, twelve heads a group."""
    from gaugekit.triton_kernels.single_cache_attention import single_cache_attention

    def empty(*shape, kind=dtype):
        return torch.empty(*shape, dtype=getattr(torch, kind), device="cuda")

    q, heads = empty(2, 12 * groups, queries, width), 12 * groups
    cache = empty(*(256, groups, pages, width) if pages else (2, groups, 2048, width))
    table = torch.zeros(2, 128, dtype=torch.int32).cuda() if pages else None
    cos, gains = (empty(2048, pairs, kind=FP32) if pairs else None), [None] * 3
    if terms:
        gains = [torch.ones(heads).cuda() for _ in range(3)]
    gain, lengths = (empty(width) if pairs else None), torch.zeros(2, dtype=torch.int64).cuda()
    out = empty(2, heads, queries, width // 12 if slices else width)
    mask = (True, window, lengths, lengths, table)
    single_cache_attention(q, cache, slices, *gains, gain, cos, cos, *mask, 0.125, out)


def launch_attention(
    dtype, width, key_width=0, groups=2, causal=True, window=None, packed=False, terms=False, energy=False,
    ranks=None, rows=2048,
):  # fmt: skip
    """Forward with every term, and backward; a combine without ``key_width``.

    The backward pass of an attention gets β alone unless ``terms``: the sweep for the others is the combine's.
    """
    from gaugekit.triton_kernels.nonlocal_energy import nonlocal_energy, nonlocal_energy_backward
    from gaugekit.triton_kernels.ragged_attention import ragged_attention
    from gaugekit.triton_kernels.ragged_attention_backward import ragged_attention_backward
    from gaugekit.triton_kernels.shaped_attention import shaped_attention
    from gaugekit.triton_kernels.shaped_attention_backward import shaped_attention_backward
    from gaugekit.triton_kernels.shaped_combine import shaped_combine
    from gaugekit.triton_kernels.shaped_combine_backward import shaped_combine_backward

    def operand(heads, columns):
        return torch.empty(1, heads, rows, columns, dtype=getattr(torch, dtype), device="cuda")

    bounds = torch.tensor([0, 100, rows], dtype=torch.int32).cuda() if packed else None
    a, v, v0, gain = operand(2, width), operand(groups, width), operand(groups, width), torch.ones(2).cuda()
    every, mask = (gain, gain, gain, v0, gain), (causal, window, None, None, bounds)
    lse = torch.empty(1, 2, rows, device="cuda")
    if ranks:
        q, k = (operand(1, sum(ranks))[:, 0] for _ in range(2))
        ragged_attention(q, k, v, ranks, *mask, 0.125, a, lse)
        ragged_attention_backward(a, q, k, v, a, lse, ranks, *mask, 0.125, q, k, v)
        return
    if not key_width:
        shaped_combine(a, a, v, *every, *mask)
        shaped_combine_backward(a, a, v, *every, *mask, da=a, dv=a, dv0=a)
        return
    q, k = operand(2, key_width), operand(groups, key_width)
    if energy:
        nonlocal_energy(v, q, k, lse, causal, None, 0.125, lse, lse, a)
        nonlocal_energy_backward(lse, lse, v, q, k, lse, lse, a, causal, None, 0.125, False, a, q, k)
        return
    shaped_attention(q, k, v, *every, *mask, 0.125, a, a, lse)
    some = every if terms else (None, gain, None, None, None)
    shaped_attention_backward(a, q, k, v, a, lse, *some, *mask, 0.125, q, k, v, a if terms else None)
