"""Blobs and files made once and kept: every path still makes and reads exactly these bytes."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from gaugekit import codec
from gaugekit.coder import encoder
from gaugekit.ops.rans import operator as rans
from gaugekit.reference import rans as oracle
from golden_blobs import GOLDEN, VECTORS, golden


def test_golden_files_are_those_of_the_vectors():
    assert {path.stem for path in GOLDEN.glob("*.hex")} == {*VECTORS, "packed_file", "packed_file_2"}


def test_golden_packed_file(tmp_path):
    """A file of one coded and one raw tensor; the digits of its header's checksum stand at bytes 58 to 65."""
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"ids":{"dtype":"I16","shape":[3],"data_offsets":[0,6]},'
        b'"w":{"dtype":"F32","shape":[70,3],"data_offsets":[6,846]}} '
    )
    data = np.arange(3, dtype="<i2").tobytes() + np.full(210, 1, "<f4").tobytes()
    original = len(header).to_bytes(8, "little") + header + data
    (tmp_path / "original").write_bytes(original)
    codec.pack(tmp_path / "original", tmp_path / "packed")
    packed = golden("packed_file")
    assert (tmp_path / "packed").read_bytes() == packed
    length = int.from_bytes(packed[:8], "little")
    assert packed[58:66] == b"%08x" % oracle.crc32c(packed[:58] + b"00000000" + packed[66 : 8 + length])
    assert packed[8 + length :].startswith(golden("fp32_constant"))
    page = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
    assert packed[8:58].decode() in page
    codec.unpack(tmp_path / "packed", tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == original


def test_golden_packed_file_of_version_2(tmp_path):
    """The same two tensors and a metadata key ``gaugekit``; read here by nothing but what docs/format.md says."""
    header = (
        b'{"__metadata__":{"gaugekit":"mine"},'
        b'"ids":{"dtype":"I16","shape":[3],"data_offsets":[0,6]},'
        b'"w":{"dtype":"F32","shape":[70,3],"data_offsets":[6,846]}}'
    )
    ids, ones = np.arange(3, dtype="<i2").tobytes(), np.full(210, 1, "<f4").tobytes()
    original = len(header).to_bytes(8, "little") + header + ids + ones
    packed = golden("packed_file_2")
    length = int.from_bytes(packed[:8], "little")
    assert packed[58:66] == b"%08x" % oracle.crc32c(packed[:58] + b"00000000" + packed[66 : 8 + length])
    listed = json.loads(packed[8 : 8 + length])
    entry = json.loads(listed["__metadata__"]["gaugekit"])
    assert (entry["version"], entry["tensors"], entry["header"][:2]) == (2, 2, ["zlib", len(header)])
    (begin, end), (middle, last) = (
        listed[f"gaugekit.{name}"]["data_offsets"] for name in ("tensors", "header")
    )
    assert (begin, end, 8 + length + last) == (0, middle, len(packed))
    stored, section = packed[8 + length :][:end], packed[8 + length :][middle:last]
    assert entry["header"][2] == oracle.crc32c(section)
    blob = golden("fp32_constant")
    assert stored == blob + ids
    places = np.array([1, 0], "<u4").tobytes() + bytes([1, 0]) + len(blob).to_bytes(8, "little")
    sums = np.array([oracle.crc32c(blob), oracle.crc32c(ids)], "<u4").tobytes()
    assert zlib.decompress(section) == header + places + sums
    (tmp_path / "packed").write_bytes(packed)
    codec.unpack(tmp_path / "packed", tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == original
    codec.pack(tmp_path / "restored", tmp_path / "again")  # any zlib may write the section
    assert (tmp_path / "again").read_bytes()[512 : 512 + end] == stored
    assert codec.unpack(tmp_path / "again", tmp_path / "restored")["bytes_after"] == len(original)


@pytest.mark.parametrize("name", VECTORS)
def test_golden_blob(name):
    tensor, symbols, chunk_log2 = VECTORS[name]
    data, shape, element = (
        tensor.reshape(-1).view(torch.uint8).numpy(),
        tuple(tensor.shape),
        rans.ELEMENTS[tensor.dtype],
    )
    blob = golden(name)
    assert codec.encode(tensor, symbols=symbols, chunk_log2=chunk_log2) == blob
    assert encoder.encode(data, shape, element, rans.KINDS[symbols], chunk_log2).tobytes() == blob
    assert oracle.encode(data.tobytes(), shape, element, rans.KINDS[symbols], chunk_log2) == blob
    assert oracle.decode(blob) == (data.tobytes(), shape, element)
    decoded = codec.decode(blob)
    assert decoded.dtype == tensor.dtype and decoded.shape == tensor.shape
    assert (decoded.reshape(-1).view(torch.uint8).numpy() == data).all()
