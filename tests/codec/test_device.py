"""What a GPU's lanes do, run lane by lane on the CPU from the same source; and on a GPU where there is one."""

import numpy as np
import pytest
import torch

from damaged_blobs import base, every, put, seal
from gaugekit import codec
from gaugekit.codec.tensors.device import DeviceDecoder
from gaugekit.ops.rans import operator as rans
from gaugekit.ops.rans import rows as rans_rows
from gaugekit.reference.rans import crc32c
from golden_blobs import VECTORS, golden

DAMAGED = every()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy()


def normal(count: int, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    scale = 0.02 if dtype.is_floating_point else 20
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_every_golden_vector_in_one_launch(device):
    decoder = DeviceDecoder([golden(name) for name in VECTORS], device)
    for (tensor, _, _), found in zip(VECTORS.values(), decoder.load(), strict=True):
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert (bits(found) == bits(tensor)).all()
    decoder.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", rans.SYMBOLS)
def test_chunks_and_ranges(device, dtype):
    tensor = normal(70_000, dtype)
    ranges = [None, (0, 0), (5, 6), (16_383, 16_385), (16_384, 32_768), (30_000, 70_000), (69_999, 70_000)]
    for symbols in rans.SYMBOLS[dtype]:
        blob = codec.encode(tensor, symbols=symbols, chunk_log2=14)
        decoder = DeviceDecoder([blob] * len(ranges), device, ranges)
        for wanted, found in zip(ranges, decoder.load(), strict=True):
            assert (bits(found) == bits(tensor[slice(*(wanted or (None,)))])).all()
        decoder.check()


@pytest.mark.parametrize("device", DEVICES)
def test_a_range_writes_nothing_else(device):
    blob = torch.frombuffer(bytearray(codec.encode(normal(5000))), dtype=torch.uint8)
    rows = torch.from_numpy(rans_rows.rows_of(blob, 100, 4000, 0, 64).view(np.uint8)).to(device)
    out = torch.full((64 + 7800 + 64,), 7, dtype=torch.uint8, device=device)
    damaged = torch.full((1,), 9, dtype=torch.int32, device=device)
    rans_rows.decode_rows(blob.to(device), rows, out, damaged)
    assert damaged.item() == 0
    assert (out[:64] == 7).all() and (out[-64:] == 7).all()
    assert (out[64:-64].cpu().numpy() == bits(normal(5000)[100:4000])).all()


UNSEEN = "checksum of decoded bytes"  # the device does not compute it; the bytes themselves are sound


@pytest.mark.parametrize("name", [name for name in DAMAGED if name != UNSEEN])
def test_damage_is_refused(name):
    """By the host, before anything is sent, or by a chunk that does not end as a sound one does."""
    with pytest.raises(codec.CorruptFile):
        decoder = DeviceDecoder([DAMAGED[name]], "cpu")
        decoder.load()
        decoder.check()


def with_coded_checksums(blob: bytes) -> bytes:
    """The checksums of the coded bytes made right, so that only what decodes them can object."""
    begin = 48 + 16 * ((8 * blob[15] + 15) // 16)
    for i in range(int.from_bytes(blob[32:36], "little")):
        at = begin + 32 * i
        offset, length = (
            int.from_bytes(blob[at : at + 8], "little"),
            int.from_bytes(blob[at + 8 : at + 12], "little"),
        )
        blob = put(blob, at + 24, "I", crc32c(blob[offset : offset + length]))
    return seal(blob)


@pytest.mark.parametrize("device", DEVICES)
def test_a_hostile_stream_is_seen_and_reads_nothing_else(device):
    """Tables, states and words that lie, behind checksums that are right."""
    rng = np.random.default_rng(0)
    for place in [128 + 2, 128 + 256 + 2, 128 + 256 + 8, *rng.integers(128, len(base()) // 3, 20)]:
        blob = with_coded_checksums(put(base(), int(place), "B", base()[place] ^ 0x5A))
        decoder = DeviceDecoder([blob], device)
        decoder.load()
        try:
            expected = codec.decode(blob)
        except codec.CorruptFile as error:
            if "checksum" not in str(error):  # of the decoded bytes, which the device does not compute
                with pytest.raises(codec.CorruptFile):
                    decoder.check()
            continue
        assert (bits(decoder.tensors[0]) == bits(expected)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_contradict_the_sizes_are_refused(device):
    blob = torch.frombuffer(bytearray(codec.encode(normal(3000))), dtype=torch.uint8)
    packed = blob.to(device)
    sound = rans_rows.rows_of(blob, 0, 3000, 0, 0)
    for field, value in {
        "in": [8, 16, 1 << 40, (1 << 64) - 16],
        "out": [1, 16, 1 << 62],
        "to": [3001, 1 << 31],
        "from": [3001],
        "n": [3200],
        "length": [0, 16, 1 << 31],
        "symbols": [0, 257],
        "width": [0, 3, 4],
        "kind": [2, 3],
    }.items():
        for wrong in value:
            rows = sound.copy()
            rows[field] = wrong
            damaged = torch.zeros(1, dtype=torch.int32, device=device)
            out = torch.zeros(6000, dtype=torch.uint8, device=device)
            table = torch.from_numpy(rows.view(np.uint8)).to(device)
            torch.ops.gaugekit.rans_decode_rows(packed, table, out, damaged)
            assert damaged.item() == 1, (field, wrong)


def test_operator_is_registered_as_its_schema_says():
    blob = torch.frombuffer(bytearray(codec.encode(normal(300))), dtype=torch.uint8)
    rows = torch.from_numpy(rans_rows.rows_of(blob, 0, 300, 0, 0).view(np.uint8))
    arguments = (blob, rows, torch.zeros(600, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32))
    torch.library.opcheck(torch.ops.gaugekit.rans_decode_rows.default, arguments)


def test_the_composition_agrees():
    blobs = [golden(name) for name in VECTORS]
    decoder = DeviceDecoder(blobs, "cpu")
    decoder.upload()
    rans_rows._decode_rows(decoder._packed, decoder._rows, decoder._out, decoder._damaged)
    decoder.check()
    for (tensor, _, _), found in zip(VECTORS.values(), decoder.tensors, strict=True):
        assert (bits(found) == bits(tensor)).all()


@pytest.mark.gpu
def test_a_cuda_graph_repeats_it():
    """The decoder's one launch is rans_decode_rows, which synchronises nothing."""
    decoder = DeviceDecoder([codec.encode(normal(50_000))], "cuda")
    decoder.upload()
    decoder.decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.decode()
    decoder.tensors[0].zero_()
    graph.replay()
    assert (bits(decoder.tensors[0]) == bits(normal(50_000))).all()
