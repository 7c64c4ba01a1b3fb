"""The product of the CUDA binary on up to 16 rows, both variants, beside the CPU's and its oracle."""

import pytest
import torch
from torch.nn.functional import linear

import gaugekit  # noqa: F401
from gaugekit import _library
from gaugekit.ops.packed_linear import PackedWeight, pack_weight, packed_linear
from gaugekit.ops.packed_linear.cuda import TILE_COLUMNS, VARIANTS, variant
from gaugekit.reference import packed_linear as reference
from helpers import assert_accurate

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 64), (17, 70), (40, 1030), (130, 4096), (33, 9000)]
rows_of_x = torch.ops.gaugekit.packed_linear_rows


def matrix(n: int, k: int, dtype: torch.dtype, escaped: float = 0.02) -> torch.Tensor:
    """N(0, 0.02²) with a share of zeros and of small numbers, whose exponents escape."""
    weight = torch.randn(n, k) * 0.02
    small = torch.rand(n, k)
    weight[small < escaped] *= 2.0**-9
    weight[small < escaped / 4] = 0
    return weight.to(dtype)


def on_gpu(packed: PackedWeight) -> list[torch.Tensor]:
    return [part.cuda() for part in packed[:5]]


def ways(dtype: torch.dtype, columns: int) -> list[int]:
    tile = dtype != torch.float32 and columns <= TILE_COLUMNS
    return [VARIANTS["lanes"], VARIANTS["tile"]] if tile else [VARIANTS["lanes"]]


def test_variants_by_dtype_and_width():
    for dtype in DTYPES:
        assert variant(dtype, TILE_COLUMNS) == VARIANTS["tile"]
        assert variant(dtype, TILE_COLUMNS + 1) == VARIANTS["lanes"]
    assert variant(torch.float32, 64) == VARIANTS["lanes"]


@pytest.mark.parametrize("way", VARIANTS.values(), ids=VARIANTS)
def test_composition_and_schema(way):
    weight = matrix(5, 70, torch.bfloat16)
    packed, x = pack_weight(weight), torch.randn(2, 70).bfloat16()
    assert_accurate(
        rows_of_x(x, *packed[:5], None, way),
        reference.packed_linear(x, *packed[:5], None),
        linear(x, weight),
    )
    torch.library.opcheck(rows_of_x.default, (x, *packed[:5], None, way))


@pytest.mark.gpu
def test_the_binary_has_it():
    assert _library.implementation("packed_linear_rows", "CUDA")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code_bits", [3, 4])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_product(dtype, code_bits, n, k):
    weight = matrix(n, k, dtype)
    packed = pack_weight(weight, code_bits=code_bits)
    parts = on_gpu(packed)
    for batch in (1, 2, 7, 8, 9, 16):
        for kind in (dtype, torch.float32):
            x, bias = torch.randn(batch, k).to(kind), torch.randn(n).to(kind)
            exact = reference.packed_linear(x, *packed[:5], bias)
            plain = linear(x.cuda(), weight.cuda().to(kind), bias.cuda()).cpu()
            for way in ways(kind, k):
                y = rows_of_x(x.cuda(), *parts, bias.cuda(), way)
                assert y.dtype == kind and y.shape == (batch, n)
                assert_accurate(y.cpu(), exact, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code_bits", [3, 4])
@pytest.mark.parametrize("way", VARIANTS.values(), ids=VARIANTS)
def test_unit_rows_of_x_give_back_every_weight(dtype, code_bits, way):
    """x holds one 1: each sum has one term, so y is a column of W, bit for bit but for the sign of zero."""
    weight = matrix(35, 1100, dtype, escaped=0.2)
    packed = pack_weight(weight, code_bits=code_bits)
    parts = on_gpu(packed)
    for first in range(0, 1100, 16):
        columns = torch.arange(first, min(first + 16, 1100))
        x = torch.nn.functional.one_hot(columns, 1100).to(dtype).cuda()
        assert torch.equal(rows_of_x(x, *parts, None, way).cpu(), weight[:, columns].T)


@pytest.mark.gpu
@pytest.mark.parametrize("way", VARIANTS.values(), ids=VARIANTS)
def test_same_bits_for_every_batch_and_every_call(way):
    parts = on_gpu(pack_weight(matrix(50, 1500, torch.bfloat16)))
    x = torch.randn(16, 1500, device="cuda").bfloat16()
    together = rows_of_x(x, *parts, None, way)
    assert torch.equal(rows_of_x(x, *parts, None, way), together)
    assert torch.equal(rows_of_x(x[:8].contiguous(), *parts, None, way), together[:8])
    assert torch.equal(
        torch.cat([rows_of_x(x[i : i + 1].contiguous(), *parts, None, way) for i in range(16)]), together
    )


@pytest.mark.gpu
@pytest.mark.parametrize("way", VARIANTS.values(), ids=VARIANTS)
def test_special_numbers_reach_the_output(way):
    weight = matrix(20, 70, torch.bfloat16)
    weight[0, 3], weight[17, 65], weight[2, 69] = float("inf"), float("nan"), -float("inf")
    y = rows_of_x(torch.ones(1, 70).bfloat16().cuda(), *on_gpu(pack_weight(weight)), None, way)[0]
    assert y[0] == float("inf") and y[17].isnan() and y[2] == -float("inf")
    assert y.isfinite().sum() == 17


@pytest.mark.gpu
@pytest.mark.parametrize("way", VARIANTS.values(), ids=VARIANTS)
def test_rows_of_many_escapes(way):
    """Exponents spread over all of bfloat16's: nearly every weight escapes, several lists full a row."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(97, 130, (20, 3000), generator=generator)
    weight = (torch.randn(20, 3000, generator=generator).sign() * 2.0 ** (exponents - 127)).bfloat16()
    packed, x = pack_weight(weight), torch.randn(3, 3000).bfloat16()
    assert packed.escapes.numel() > 20 * 1024
    y = rows_of_x(x.cuda(), *on_gpu(packed), None, way).cpu()
    plain = linear(x.cuda(), weight.cuda()).cpu()
    assert_accurate(y, reference.packed_linear(x, *packed[:5], None), plain)


@pytest.mark.gpu
def test_strided_input_and_a_bias_that_is_a_view():
    weight = matrix(40, 200, torch.bfloat16)
    packed = pack_weight(weight)
    moved = PackedWeight(*on_gpu(packed), packed.columns)
    x, bias = torch.randn(5, 400).bfloat16(), torch.randn(80).bfloat16()
    for cut in (x[:, ::2], x[:, 1:201], x.T.contiguous().T[:, 200:]):
        assert_accurate(
            packed_linear(cut.cuda(), moved, bias.cuda()[::2]).cpu(),
            reference.packed_linear(cut, *packed[:5], bias[::2]),
            linear(cut.cuda(), weight.cuda(), bias.cuda()[::2]).cpu(),
        )


@pytest.mark.gpu
def test_wide_rows_go_to_the_lanes_and_tiles_refuse_them():
    weight = matrix(3, TILE_COLUMNS + 64, torch.bfloat16)
    packed, x = pack_weight(weight), torch.randn(2, TILE_COLUMNS + 64).bfloat16()
    parts = on_gpu(packed)
    for columns, way in ((TILE_COLUMNS, VARIANTS["tile"]), (TILE_COLUMNS + 64, VARIANTS["lanes"])):
        part = pack_weight(weight[:, :columns])
        y = rows_of_x(x[:, :columns].contiguous().cuda(), *on_gpu(part), None, way).cpu()
        plain = linear(x[:, :columns].cuda(), weight[:, :columns].cuda()).cpu()
        assert_accurate(y, reference.packed_linear(x[:, :columns], *part[:5], None), plain)
    with pytest.raises(RuntimeError, match="variant: expected 0"):
        rows_of_x(x.cuda(), *parts, None, VARIANTS["tile"])
    with pytest.raises(RuntimeError, match="variant: expected 0"):
        rows_of_x(x.float().cuda(), *parts, None, VARIANTS["tile"])


@pytest.mark.gpu
@pytest.mark.parametrize("way", VARIANTS.values(), ids=VARIANTS)
def test_a_cuda_graph_on_a_side_stream_repeats_it(way):
    """Nothing synchronises: a graph may hold the call, and replays it on new numbers."""
    parts = on_gpu(pack_weight(matrix(70, 4096, torch.bfloat16)))
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    rows_of_x(x, *parts, None, way)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rows_of_x(x, *parts, None, way)
    x.copy_(torch.randn(4, 4096, device="cuda"))
    graph.replay()
    assert torch.equal(y, rows_of_x(x, *parts, None, way))
