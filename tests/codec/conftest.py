import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def fuzz_target(tmp_path_factory):
    """csrc/fuzz/rans_fuzz.cpp under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = next(
        (c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None
    )
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    binary = tmp_path_factory.mktemp("fuzz") / "rans_fuzz"
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-static-libasan",
    ]
    source = [f"-I{ROOT / 'csrc'}", ROOT / "csrc" / "fuzz" / "rans_fuzz.cpp", "-o", binary]
    done = subprocess.run([compiler, *flags, *source], capture_output=True, text=True)
    if done.returncode:
        flags.remove("-static-libasan")
        done = subprocess.run([compiler, *flags, *source], capture_output=True, text=True)
    if done.returncode and "sanitize" in done.stderr:
        pytest.skip(f"needs the sanitizers' libraries: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return binary


@pytest.fixture
def source(tmp_path):
    """A model directory with folders, a hidden file and an empty folder."""
    path = tmp_path / "m"
    (path / "sub" / "empty").mkdir(parents=True)
    weight = (torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    save_file({"w": weight}, path / "model.safetensors")
    (path / ".hidden").write_text("kept")
    (path / "config.json").write_text("{}")
    return path
