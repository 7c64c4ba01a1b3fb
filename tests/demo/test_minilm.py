"""The demo keeps its promises on the real model, and without the C++ binary, where NumPy codes, on a small one."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gaugekit
import tiny_directory
from gaugekit import _library, codec, samples
from gaugekit.demo import holds
from gaugekit.report import Report
from helpers import minilm
from warm import python

REMOVED = {"value_output": 73728, "query_key": 73728, "key_bias": 2304, "value_bias": 2304, "total": 152064}
WITHOUT = """
from pathlib import Path
from gaugekit import codec, demo
demo.run("demo", model="tiny-bert", language_model="tiny-llama", sentences=16, seconds=0.2)
for path in Path("layer").iterdir():
    codec.pack(path, Path("packed", path.name))
"""

pytestmark = [minilm, pytest.mark.slow]


def run(program: str, folder: Path, package: Path) -> Report:
    """The report of a demo in a process of its own, with the gaugekit of ``package``."""
    quiet = {"PYTHONWARNINGS": "ignore::RuntimeWarning", "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [*python(), "-c", program], cwd=folder, env={**os.environ, **quiet}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Report("demo", json.loads((folder / "demo" / "report.json").read_text()))


def test_the_demo_keeps_its_promises(tmp_path):
    program = "from gaugekit import demo; demo.run('demo', sentences=16, seconds=0.2)"
    report = run(program, tmp_path, Path(gaugekit.__file__).parent)
    assert report["machine"]["binary"] == _library.backends()["cpu"].loaded
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


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(report, folder) of a demo by a copy of gaugekit without binaries, which then packs a layer of MiniLM."""
    folder = tmp_path_factory.mktemp("bare")
    copy = folder / "python" / "gaugekit"
    ours = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(Path(gaugekit.__file__).parent, copy, ignore=ours)
    tiny_directory.write(folder / "tiny-bert")
    tiny_directory.write_speaker(folder / "tiny-llama")
    weights = load_file(samples.minilm() / "model.safetensors")
    layer = {name: tensor for name, tensor in weights.items() if "encoder.layer.3." in name}
    assert sum(tensor.numel() for tensor in layer.values()) == 1_774_464
    for name in ("layer", "packed"):
        (folder / name).mkdir()
    for dtype in (torch.float32, torch.bfloat16):
        save_file({name: tensor.to(dtype) for name, tensor in layer.items()}, folder / "layer" / str(dtype))
    return run(WITHOUT, folder, copy), folder


def test_without_a_binary_the_demo_proves_the_same(bare):
    report, folder = bare
    assert report["machine"]["binary"] is False and holds(report)
    assert report["fp32"]["min_cosine"] >= 0.999999 and len(report["running"]) == 2
    assert report["bf16"]["relative_error"] <= 1.2 * report["bf16"]["noise"]
    assert all(road["max_abs_error"] <= 2e-6 for road in report["loaded"].values())
    assert (folder / "demo" / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_binary_the_same_bytes(bare, dtype, tmp_path):
    """NumPy packs, slower, what the binary packs."""
    if not _library.backends()["cpu"].loaded:
        pytest.skip("gaugekit was installed without its C++ binary")
    codec.pack(bare[1] / "layer" / f"torch.{dtype}", tmp_path / "packed")
    packed = (tmp_path / "packed").read_bytes()
    assert packed == (bare[1] / "packed" / f"torch.{dtype}").read_bytes()
    assert len(packed) < 0.84 * (bare[1] / "layer" / f"torch.{dtype}").stat().st_size
