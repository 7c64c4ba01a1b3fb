"""Damage is refused with CorruptFile, by the operator and by the NumPy composition alike, never decoded
wrong.
"""

import subprocess
import tracemalloc

import numpy as np
import pytest
import torch

from damaged_blobs import base, every, put, seal
from gaugekit import codec
from gaugekit.codec.tensors.blob import as_byte_tensor
from gaugekit.coder import composition, header
from gaugekit.ops.rans import operator as rans
from gaugekit.reference import rans as oracle

DAMAGED = every()


def numpy_decode(blob: bytes):
    data = np.frombuffer(blob, np.uint8)
    count = composition.open_blob(data).count
    composition.decode(data, 0, count, np.empty(2 * count, np.uint8))


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused(name):
    with pytest.raises(codec.CorruptFile, match="not a sound coded blob: "):
        codec.decode(DAMAGED[name])
    with pytest.raises(RuntimeError, match=header.CORRUPT):
        numpy_decode(DAMAGED[name])
    for path in (0, 1, 2, 3):
        with pytest.raises(codec.CorruptFile, match="not a sound coded blob: "):
            blob = as_byte_tensor(DAMAGED[name])
            count = rans.open_blob(blob)[1].numel()
            rans.decode(blob, 0, count, torch.empty(count, dtype=torch.bfloat16), path)


def test_the_damaged_are_many_and_the_base_is_sound():
    assert len(DAMAGED) > 250
    assert codec.decode(base()).shape == (24577,)
    assert seal(base()) == base()


def small_blob() -> tuple[bytes, torch.Tensor]:
    tensor = (torch.randn(900, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    return codec.encode(tensor), tensor


def test_every_flipped_byte_is_detected_or_harmless():
    blob, tensor = small_blob()
    harmless = 0
    for place in range(len(blob)):
        damaged = put(blob, place, "B", blob[place] ^ 0x41)
        try:
            decoded = codec.decode(damaged)
        except codec.CorruptFile:
            continue
        assert torch.equal(decoded.view(torch.int16), tensor.view(torch.int16)), f"byte {place}"
        harmless += 1
    assert harmless < 16 * 6, "only padding may be flipped without being seen"


def test_every_flipped_byte_in_numpy():
    blob, tensor = small_blob()
    for place in range(0, len(blob), 3):
        data = np.frombuffer(put(blob, place, "B", blob[place] ^ 0x41), np.uint8)
        out = np.empty(1800, np.uint8)
        try:
            composition.decode(data, 0, 900, out)
        except RuntimeError as error:
            assert header.CORRUPT in str(error)
            continue
        assert (out == tensor.view(torch.uint8).numpy()).all(), f"byte {place}"


def test_checksum_of_coded_bytes_covers_every_coded_byte():
    blob, _ = small_blob()
    oracle.decode(blob)
    for place in range(96, len(blob), 97):
        with pytest.raises(ValueError, match="coded bytes"):
            oracle.decode(put(blob, place, "B", blob[place] ^ 1))


def test_a_huge_count_allocates_nothing():
    tracemalloc.start()
    try:
        for name in ("2^59 + 1 elements, shape too", "2^60 elements"):
            with pytest.raises(codec.CorruptFile):
                codec.decode(DAMAGED[name])
            with pytest.raises(RuntimeError, match=header.CORRUPT):
                numpy_decode(DAMAGED[name])
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_sanitizers_see_nothing(fuzz_target, tmp_path):
    """The torch-free parser, decoder and encoder under AddressSanitizer and UBSan, on every damaged blob."""
    names, paths = [], []
    blob, _ = small_blob()
    flips = {f"flip {place}": put(blob, place, "B", blob[place] ^ 0x41) for place in range(0, len(blob), 7)}
    inputs = {**DAMAGED, **flips, "empty": b"", "one byte": b"G"}
    for number, (name, damaged) in enumerate({**inputs, "sound": blob, "sound base": base()}.items()):
        path = tmp_path / str(number)
        path.write_bytes(damaged)
        names.append(name)
        paths.append(path)
    done = subprocess.run([fuzz_target, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    verdicts = dict(zip(names, done.stdout.splitlines(), strict=True))
    assert verdicts["sound"] == verdicts["sound base"] == "sound"
    assert [name for name in {**DAMAGED, "empty": b"", "one byte": b""} if verdicts[name] == "sound"] == []
