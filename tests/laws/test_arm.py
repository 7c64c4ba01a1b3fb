"""The CPU binary's sources compile for 64-bit ARM. What they compute there is for the tests in an emulator."""

import ast
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import arm

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(shutil.which(arm.COMPILER) is None, reason=arm.NEEDED),
    pytest.mark.slow,
]


def of_setup(name: str):
    """A list of constants that setup.py names."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == name:
            return ast.literal_eval(statement.value)
    raise KeyError(name)


def test_every_source_compiles_for_arm(tmp_path):
    """Without optimisation: which functions exist, what types agree and which instructions a function may use."""
    from torch.utils.cpp_extension import include_paths

    folders = [ROOT / "csrc", *include_paths(), sysconfig.get_paths()["include"]]
    flags = [flag for flag in of_setup("FLAGS") if flag != "-O3"]
    flags += [f"-DTORCH_TARGET_VERSION={of_setup('STABLE_ABI_TORCH_2_11')}", *(f"-I{f}" for f in folders)]

    def compile_one(source: Path) -> str:
        command = [arm.COMPILER, "-O0", *flags, "-c", source, "-o", tmp_path / f"{source.stem}.o"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        return "" if done.returncode == 0 else f"{source.name}: {done.stderr[-4000:]}"

    sources = sorted(path for name in ("cpu", "codec") for path in (ROOT / "csrc" / name).glob("*.cpp"))
    with ThreadPoolExecutor(2) as pool:
        assert not [failure for failure in pool.map(compile_one, sources) if failure]
    symbols = shutil.which("aarch64-linux-gnu-nm")
    if symbols:
        listing = subprocess.run(
            [symbols, "-C", tmp_path / "packed_linear.o"], capture_output=True, text=True, check=True
        ).stdout
        assert "multiply_neon<" in listing and "multiply_few<" in listing  # not the portable form alone
