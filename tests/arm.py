"""Programs for 64-bit ARM, compiled by a cross compiler and run in an emulator, where a machine has both."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
NEEDED = f"needs {COMPILER} and {EMULATOR} (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)"
EMULATED = pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=NEEDED)
# What the emulator plays, and how many levels of csrc/common/isa.h that has: BF16, or NEON alone.
PROCESSORS = {"max": 3, "cortex-a72": 2}


def compiled(source: Path, binary: Path, *flags: str) -> Path:
    """``binary``, linked in full: the emulator needs no ARM system to run it."""
    command = [COMPILER, "-std=c++17", "-static", "-pthread", "-Wno-psabi", *flags, f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(binary)], check=True, timeout=600)
    return binary


def run(binary: Path, processor: str, *arguments: str, capability: str = "") -> list[str]:
    """The lines that ``binary`` prints on ``processor``, under torch's switch ``capability`` where one is given."""
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    environment |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
    command = [EMULATOR, "-cpu", processor, str(binary), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=environment)
    return done.stdout.splitlines()
