"""Packed weights give the bits that the same product, in the same order of summation, gives on plain weights."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_same_bits_as_on_plain_weights_on_every_instruction_set(tmp_path):
    binary, source = tmp_path / "twin", ROOT / "tests" / "ops" / "packed_linear_twin.cpp"
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(binary)], check=True, timeout=300)
    done = subprocess.run([str(binary)], capture_output=True, text=True, check=True, timeout=120)
    *differing, summary = done.stdout.splitlines()
    assert not differing
    levels, cases = (int(part.split()[1]) for part in summary.split(", "))
    assert cases == levels * 5 * 16  # five batches, sixteen matrices
