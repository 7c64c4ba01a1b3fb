"""A missing or damaged binary is slow, never broken: one warning that says what mends it, or an error on request."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from warm import python

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
        [*python(), "-c", code],
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


@pytest.fixture
def beside_cuda(copy):
    """As where torch has CUDA: the loader asks only for the version it was built with."""
    (copy / "torch_with_cuda.py").write_text("import torch; torch.version.cuda = '13.0'")
    return copy


def test_damaged_cuda_binary_is_named_with_the_linker_s_reason_where_a_gpu_is(beside_cuda):
    """Beside a GPU the compositions would answer for the missing kernels, and nobody would know."""
    package = beside_cuda / "gaugekit"
    (package / "_cuda.abi3.so").write_bytes(b"not a library")
    loader = package / "_library.py"
    asked = 'any(Path("/dev").glob("nvidia[0-9]*"))'
    assert loader.read_text().count(asked) == 1
    quiet = run(beside_cuda, "import torch_with_cuda; " + USE)
    loader.write_text(loader.read_text().replace(asked, "True"))
    done = run(beside_cuda, "import torch_with_cuda; " + USE)
    assert done.returncode == 0, done.stderr
    assert "without its CUDA binary" not in quiet.stderr or any(Path("/dev").glob("nvidia[0-9]*"))
    assert "without its CUDA binary" in done.stderr
    assert "file too short" in done.stderr or "invalid ELF header" in done.stderr


@pytest.mark.skipif(not (PACKAGE / "_cpu.abi3.so").exists(), reason="needs the C++ binary")
def test_a_required_binary_keeps_what_loading_it_raised(beside_cuda):
    (beside_cuda / "gaugekit" / "_cuda.abi3.so").write_bytes(b"not a library")
    shutil.copy(PACKAGE / "_cpu.abi3.so", beside_cuda / "gaugekit")
    shutil.copy(PACKAGE / "_build.json", beside_cuda / "gaugekit")
    code = (
        "import torch_with_cuda\n"
        "try: import gaugekit\n"
        "except ImportError as error: print(type(error.__cause__).__name__, error)\n"
    )
    done = run(beside_cuda, code, GAUGEKIT_REQUIRE="cpu,cuda")
    assert done.stdout.split()[0] in ("OSError", "RuntimeError"), done.stdout + done.stderr
    assert "GAUGEKIT_REQUIRE asks for cuda: _cuda.abi3.so does not load" in done.stdout


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
