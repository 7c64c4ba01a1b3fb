"""A real checkpoint: all-MiniLM-L6-v2 in bfloat16 and as published, with the binary and without."""

import hashlib
import os
import shutil
import subprocess
import sys
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


@pytest.mark.slow
@pytest.mark.skipif(not gk._library.backends()["cpu"].loaded, reason="needs the C++ binary to compare with")
def test_without_a_binary_the_same_bytes(checkpoints, tmp_path):
    """A copy of the package with no binary packs and unpacks through NumPy, slower and equal."""
    shutil.copytree(
        Path(gk.__file__).parent, tmp_path / "gaugekit", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    script = (
        "import warnings; warnings.simplefilter('ignore'); import sys, gaugekit as gk; "
        "assert not gk._library.backends()['cpu'].loaded; "
        "gk.codec.pack(sys.argv[1], 'numpy.safetensors'); gk.codec.unpack('numpy.safetensors', 'restored.safetensors')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "GAUGEKIT_REQUIRE": ""}
    command = [sys.executable, "-c", script, str(checkpoints["bf16"])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    gk.codec.pack(checkpoints["bf16"], tmp_path / "binary.safetensors")
    assert sha256(tmp_path / "numpy.safetensors") == sha256(tmp_path / "binary.safetensors")
    assert sha256(tmp_path / "restored.safetensors") == sha256(checkpoints["bf16"])
