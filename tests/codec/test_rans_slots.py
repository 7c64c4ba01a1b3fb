"""Both ways of decoding rows on a GPU, beside the codec: the table of slots, and whole chunks and parts of them."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gaugekit import codec
from gaugekit.ops.rans import operator as rans
from gaugekit.ops.rans import rows as rans_rows

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_table_made_together_is_the_one_made_alone(tmp_path):
    source, binary = ROOT / "tests" / "codec" / "rans_slots.cpp", tmp_path / "rans_slots"
    command = ["g++", "-O1", "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(binary)]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run([str(binary)], capture_output=True, text=True, check=True, timeout=60)
    *differing, summary = done.stdout.splitlines()
    refused, cases = (int(part.split()[1]) for part in summary.split(", "))
    assert not differing
    assert cases == 416 and 0 < refused < cases  # sound and damaged tables were both among them


def decoded(blob: bytes, start: int, stop: int, width: int, device: str, variant: int) -> torch.Tensor:
    """The bytes of elements [start, stop)."""
    data = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    rows = torch.from_numpy(rans_rows.rows_of(data, start, stop, 0, 0).view("u1")).to(device)
    out = torch.zeros((stop - start) * width, dtype=torch.uint8, device=device)
    damaged = torch.full((rows.numel() // 48,), 9, dtype=torch.int32, device=device)
    rans_rows.decode_rows(data.to(device), rows, out, damaged, variant)
    assert not damaged.any()
    return out.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", rans.SYMBOLS)
@pytest.mark.parametrize("variant", rans_rows.VARIANTS.values(), ids=rans_rows.VARIANTS)
def test_every_dtype_and_model_whole_and_in_part(device, dtype, variant):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(37_001, generator=generator) * (0.02 if dtype.is_floating_point else 20)
    tensor, width = values.to(dtype), dtype.itemsize
    raw = tensor.view(torch.uint8)
    for symbols in rans.SYMBOLS[dtype]:
        blob = codec.encode(tensor, symbols=symbols, chunk_log2=14)
        for start, stop in ((0, 37_001), (0, 16_384), (511, 513), (16_385, 33_000), (36_999, 37_001)):
            found = decoded(blob, start, stop, width, device, variant)
            assert torch.equal(found, raw[start * width : stop * width])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", rans_rows.VARIANTS.values(), ids=rans_rows.VARIANTS)
@pytest.mark.parametrize("count", [1, 2, 63, 64, 511, 512, 513, 4097])
def test_short_chunks_and_constant_planes(device, count, variant):
    generator = torch.Generator().manual_seed(count)
    for tensor in (
        torch.randn(count, generator=generator).bfloat16(),
        (2.0 ** torch.randint(-3, 4, (count,), generator=generator)).bfloat16(),
        torch.ones(count).bfloat16(),
    ):
        found = decoded(codec.encode(tensor), 0, count, 2, device, variant)
        assert torch.equal(found, tensor.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", rans_rows.VARIANTS.values(), ids=rans_rows.VARIANTS)
def test_random_bits_and_steep_tables_on_the_gpu(variant):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (1 << 18,), generator=generator, dtype=torch.uint8)
    steep = torch.randn(1 << 17, generator=generator).pow(9).bfloat16()
    for tensor in (bits.view(torch.int8), bits.view(torch.bfloat16), steep, steep.float()):
        raw = tensor.view(torch.uint8)
        for symbols in rans.SYMBOLS[tensor.dtype]:
            blob = codec.encode(tensor, symbols=symbols)
            found = decoded(blob, 0, tensor.numel(), tensor.element_size(), "cuda", variant)
            assert torch.equal(found, raw)
