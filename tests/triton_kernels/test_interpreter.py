"""Runs the kernels' tests in Triton's interpreter, in processes where triton was not imported before."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
FILES = sorted(path.name for path in FOLDER.glob("test_*.py") if path.name != Path(__file__).name)
HALVES = [FILES[0::2], FILES[1::2]]  # two processes: each imports torch, and they run beside each other
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the same files run on the GPU instead"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the same files run in this process"
    ),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (gaugekit[triton])"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("files", HALVES, ids=" ".join)
def test_kernels_in_the_interpreter(files):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(str(FOLDER / file) for file in files)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
