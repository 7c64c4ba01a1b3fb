import os
import shutil
import subprocess
from pathlib import Path

import pytest

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
