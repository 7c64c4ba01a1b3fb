"""A real checkpoint: all-MiniLM-L6-v2 in bfloat16 and as published."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gaugekit as gk
from helpers import minilm

pytestmark = minilm


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    fp32 = gk.samples.minilm() / "model.safetensors"
    bf16 = tmp_path_factory.mktemp("minilm") / "bf16.safetensors"
    weights = {n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(fp32).items()}
    save_file(weights, bf16, metadata={"format": "pt"})
    return {"fp32": fp32, "bf16": bf16}


@pytest.mark.parametrize(
    ("dtype", "symbols", "bits", "ratio"),
    [
        ("bf16", None, 10.64, 0.668),
        ("bf16", "exponent-and-mantissa", 10.57, 0.661),
        ("fp32", None, 26.56, 0.831),
    ],
)
def test_size_and_identity(dtype, symbols, bits, ratio, checkpoints, tmp_path):
    report = gk.codec.pack(checkpoints[dtype], tmp_path / "packed.safetensors", symbols=symbols)
    gk.codec.unpack(tmp_path / "packed.safetensors", tmp_path / "restored.safetensors")
    assert sha256(tmp_path / "restored.safetensors") == sha256(checkpoints[dtype])
    assert report["bits_per_weight"] <= bits
    assert report["ratio"] <= ratio
    stored = load_file(tmp_path / "packed.safetensors")
    weight = load_file(checkpoints[dtype])["embeddings.word_embeddings.weight"]
    assert torch.equal(gk.codec.decode(stored["embeddings.word_embeddings.weight"]), weight)
