"""The demo on the real model: the counts, errors and ratios it promises, with and without the C++ binary."""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import gaugekit
from gaugekit import _library
from helpers import minilm
from warm import python

REMOVED = {"value_output": 73728, "query_key": 73728, "key_bias": 2304, "value_bias": 2304, "total": 152064}
RUN = "from gaugekit import demo; print(demo.run('demo', sentences=16, seconds=0.2))"

pytestmark = [minilm, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function of whether the C++ binary is there: (report, folder) of the demo in a process of its own, run once.

    The demo is that of gaugekit as it is here, or of a copy of it without binaries.
    """

    @functools.cache
    def call(binary: bool):
        folder, package = tmp_path_factory.mktemp("demo"), Path(gaugekit.__file__).parent
        if binary and not _library.backends()["cpu"].loaded:
            pytest.skip("gaugekit was installed without its C++ binary")
        if not binary:
            copy = folder / "python" / "gaugekit"
            shutil.copytree(
                package, copy, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
            )
            package = copy
        quiet = {"PYTHONWARNINGS": "ignore::RuntimeWarning", "PYTHONPATH": str(package.parent)}
        done = subprocess.run(
            [*python(), "-c", RUN], cwd=folder, env={**os.environ, **quiet}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((folder / "demo" / "report.json").read_text()), folder / "demo"

    return call


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "no binary"])
def test_the_demo_keeps_its_promises(run, binary):
    report, folder = run(binary)
    assert report["machine"]["binary"] == binary
    assert report["parameters_before"] == 22713216 and report["parameters_removed"] == REMOVED
    assert report["fp32"]["ok"] and report["fp32"]["max_abs_error"] <= 2e-6
    assert report["fp32"]["min_cosine"] >= 0.999999
    assert report["bf16"]["relative_error"] <= 1.2 * report["bf16"]["noise"]
    assert report["pack"]["bf16"]["ratio"] <= 0.668
    assert report["pack"]["fp32"]["bit_exact"] and report["pack"]["bf16"]["bit_exact"]
    assert all(road["max_abs_error"] <= 2e-6 for road in report["loaded"].values())
    assert len(report["layers"]) == 6 and all(len(row["singular_values"]) == 12 for row in report["layers"])
    assert 2.5 < report["exponents"]["entropy_bits"] < 2.8 and len(report["exponents"]["counts"]) <= 32
    assert (folder / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_binary_the_same_bytes(run, dtype):
    """NumPy packs, slower, what the binary packs."""
    packed = [run(binary)[1] / "models" / f"original-{dtype}.packed.safetensors" for binary in (True, False)]
    assert packed[0].read_bytes() == packed[1].read_bytes()
