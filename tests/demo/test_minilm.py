"""The demo on the real model: the counts, errors and ratios it promises, with and without the C++ binary."""

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
RUN = "from gaugekit import demo; print(demo.run('demo', sentences=48, seconds=1.0))"

pytestmark = [minilm, pytest.mark.slow]


@pytest.fixture(params=[True, False], ids=["binary", "no binary"])
def setting(request, tmp_path):
    """(environment of a process, whether it has the C++ binary): gaugekit as it is here, or a copy without binaries."""
    package = Path(gaugekit.__file__).parent
    if request.param and not _library.backends()["cpu"].loaded:
        pytest.skip("gaugekit was installed without its C++ binary")
    if not request.param:
        copy = tmp_path / "python" / "gaugekit"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
        package = copy
    quiet = {"PYTHONWARNINGS": "ignore::RuntimeWarning", "PYTHONPATH": str(package.parent)}
    return {**os.environ, **quiet}, request.param


def test_the_demo_keeps_its_promises(setting, tmp_path):
    environment, binary = setting
    done = subprocess.run(
        [*python(), "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
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
    assert (tmp_path / "demo" / "report.html").stat().st_size > 20_000
