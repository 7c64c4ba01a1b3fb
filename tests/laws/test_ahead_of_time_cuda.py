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
# The compiler's passes for the host make no machine code that this law reads: objects of the GPU alone are asked for.
OPTIONS = [
    "-O3",
    "-std=c++20",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-Xptxas",
    "-v",
    "-cubin",
]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or shutil.which("gcc") is None, reason="needs nvcc and gcc")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles(source, arch, tmp_path):
    command = [NVCC, *OPTIONS, f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", *(f"-I{x}" for x in include_paths())]
    command += [str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert spills and set(spills) == {"0"}, done.stderr[-8000:]
