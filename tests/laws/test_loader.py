"""A missing or damaged binary is slow, never broken: one warning that says what mends it, or an error on request."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "gaugekit"


@pytest.fixture
def copy(tmp_path):
    """The package without binaries, on a path of its own."""
    shutil.copytree(
        PACKAGE, tmp_path / "gaugekit", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    return tmp_path


def run(path, code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        cwd=path,
    )


USE = "import torch, gaugekit as gk; q = torch.randn(1, 2, 5, 8); print(gk.shaped_attention(q, q, q).shape)"


def test_without_binary_everything_answers_with_one_warning(copy):
    done = run(copy, USE)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 2, 5, 8])" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert "pip install" in done.stderr


def test_reason_of_the_build_is_repeated(copy):
    (copy / "gaugekit" / "_build.json").write_text(
        '{"cpu": {"built": false, "why": "no compiler", "remedy": "install g++"}}'
    )
    done = run(copy, USE)
    assert "no compiler" in done.stderr and "install g++" in done.stderr


def test_damaged_binary_is_not_loaded_and_named(copy):
    (copy / "gaugekit" / "_cpu.abi3.so").write_bytes(b"not a library")
    done = run(copy, USE)
    assert done.returncode == 0, done.stderr
    assert "_cpu.abi3.so does not load" in done.stderr


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_required_backend_is_an_error(copy, name):
    done = run(copy, USE, GAUGEKIT_REQUIRE=name)
    assert done.returncode != 0
    expected = "GAUGEKIT_REQUIRE asks for cpu" if name == "cpu" else "expected names among cpu, cuda, triton"
    assert expected in done.stderr


def test_binary_of_other_sources_is_not_loaded(copy):
    """In a checkout whose C++ has moved on, the old binary could crash: it is named instead."""
    checkout = copy / "checkout"
    (checkout / "csrc").mkdir(parents=True)
    (checkout / "csrc" / "new.cpp").write_text("// changed since the build")
    (checkout / "setup.py").touch()
    (checkout / "python").mkdir()
    package = shutil.move(copy / "gaugekit", checkout / "python" / "gaugekit")
    (package / "_cpu.abi3.so").write_bytes(b"would crash")
    (package / "_build.json").write_text('{"sources": "0", "cpu": {"built": true}}')
    done = run(checkout / "python", USE)
    assert done.returncode == 0, done.stderr
    assert "built from other sources" in done.stderr
