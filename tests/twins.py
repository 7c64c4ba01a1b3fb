"""What the tests share that compile the kernels' own headers into a small program and run it."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, folder: Path) -> tuple[list[str], list[int]]:
    """Lines that name a difference, and the numbers of the last line."""
    binary, source = folder / name, ROOT / "tests" / "ops" / f"{name}.cpp"
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(binary)], check=True, timeout=300)
    done = subprocess.run([str(binary)], capture_output=True, text=True, check=True, timeout=120)
    return read(done.stdout.splitlines())


def read(lines: list[str]) -> tuple[list[str], list[int]]:
    """Lines that name a difference, and the numbers of the last line."""
    *differing, summary = lines
    return differing, [int(part.split()[1]) for part in summary.split(", ")]
