"""Law 7: every .cu compiles for sm_80 and sm_90a, without a spill, where nvcc and the compiler it calls are."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = next((c for c in (f"{HOME}/bin/nvcc", shutil.which("nvcc") or "") if os.access(c, os.X_OK)), None)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or shutil.which("gcc") is None, reason="needs nvcc and gcc")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles(source, tmp_path):
    command = [
        NVCC,
        "-O3",
        "-std=c++20",
        "--threads=0",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    command += ["-Xptxas", "-v", "-gencode=arch=compute_80,code=sm_80"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{path}" for path in include_paths()]
    command += ["-c", str(source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert spills and set(spills) == {"0"}, done.stderr[-8000:]
