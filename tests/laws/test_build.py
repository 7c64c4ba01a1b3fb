"""The build never fails for want of a compiler, says why it left something out, and leans on no unstable symbol."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "python" / "gaugekit" / "_cpu.abi3.so"


@pytest.fixture
def checkout(tmp_path):
    """The build files and two small sources."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "triton_kernels", tmp_path / "triton_kernels")
    package = tmp_path / "python" / "gaugekit"
    for init in (ROOT / "python" / "gaugekit").rglob("__init__.py"):
        target = package / init.relative_to(ROOT / "python" / "gaugekit")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    for name in ("cpu", "codec"):
        (tmp_path / "csrc" / name).mkdir(parents=True)
        (tmp_path / "csrc" / name / "probe.cpp").write_text("int gaugekit_probe() { return 1; }\n")
    return tmp_path


def build(checkout, **environment):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((checkout / "python" / "gaugekit" / "_build.json").read_text()), done.stderr


def test_no_compiler_is_written_down(checkout, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    record, message = build(checkout, PATH=str(empty), CXX="")
    assert not record["cpu"]["built"]
    assert "no C++ compiler" in record["cpu"]["why"] and "g++" in record["cpu"]["remedy"]
    assert message.count("cpu binary not built") == 1


def test_failing_compiler_is_written_down(checkout, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IEXEC)
    record, _ = build(checkout, CXX=str(broken), CC=str(broken))
    assert not record["cpu"]["built"]
    assert "build failed" in record["cpu"]["why"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_binary_is_built_once_and_anew_where_anything_changed(checkout):
    """The second build takes the first one's binary, even without a compiler that works; other sources do not."""
    record, _ = build(checkout)
    assert record["cpu"]["built"]
    binary = next((checkout / "python" / "gaugekit").glob("_cpu*.so"))
    first = binary.read_bytes()
    shutil.rmtree(checkout / "build")
    record, _ = build(checkout)
    assert (
        record["cpu"]["built"]
        and binary.read_bytes() == first
        and not list(checkout.glob("build/temp*/**/*.o"))
    )
    (checkout / "csrc" / "cpu" / "probe.cpp").write_text("int gaugekit_probe() { return 2; }\n")
    record, _ = build(checkout)
    assert record["cpu"]["built"] and binary.read_bytes() != first


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_codec_is_built_where_torch_cannot_be_imported(checkout, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('hidden')\n")
    record, message = build(checkout, PYTHONPATH=str(tmp_path))
    assert record["codec"]["built"] and (checkout / "python" / "gaugekit" / "_codec.abi3.so").exists()
    assert not record["cpu"]["built"] and "torch cannot be imported" in record["cpu"]["why"]
    assert "codec" not in message


CODEC = CPU.with_name("_codec.abi3.so")


@pytest.mark.skipif(
    not CODEC.exists() or shutil.which("readelf") is None, reason="needs the codec's binary and readelf"
)
def test_the_codec_needs_neither_torch_nor_python():
    done = subprocess.run(["readelf", "-d", str(CODEC)], capture_output=True, text=True, check=True)
    needed = {line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "(NEEDED)" in line}
    assert needed and not [name for name in needed if "torch" in name or "python" in name or "c10" in name]


@pytest.mark.skipif(not CPU.exists() or shutil.which("nm") is None, reason="needs the C++ binary and nm")
def test_binary_uses_the_stable_abi_only():
    """Symbols of c10:: or at:: would tie the binary to one torch release."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(CPU)], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert not [name for name in names if name.startswith(("_ZN3c10", "_ZN2at", "_ZNK3c10", "_ZNK2at"))]
    assert any(name.startswith("aoti_torch_") for name in names)


CUDA = CPU.with_name("_cuda.abi3.so")


@pytest.mark.skipif(
    not CUDA.exists() or shutil.which("readelf") is None, reason="needs the CUDA binary and readelf"
)
def test_cuda_binary_names_torch_s_libraries():
    """Torch's symbols are hidden from whoever does not name its libraries: without them it would never load."""
    done = subprocess.run(["readelf", "-d", str(CUDA)], capture_output=True, text=True, check=True)
    needed = {line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "(NEEDED)" in line}
    assert needed >= {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
