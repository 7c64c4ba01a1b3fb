"""What ptxas made of a .cu file: registers, spills, shared memory, and the instructions of each loop."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or the copy that comes with triton."""
    places = [f"{HOME}/bin/{name}", shutil.which(name) or ""]
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name))
    except ImportError:
        pass
    return next((place for place in places if os.access(place, os.X_OK)), None)


NVCC, CUOBJDUMP = _tool("nvcc"), _tool("cuobjdump")


@dataclass
class Kernel:
    """A compiled kernel: its instructions by address, and what ptxas says it needs."""

    name: str
    code: dict[int, str]
    registers: int = 0
    shared_bytes: int = 0
    spill_bytes: int = 0

    def loops(self) -> list[list[str]]:
        """The instructions of each loop, from a backward branch's target to the branch; the shortest first."""
        spans = []
        for address, text in self.code.items():
            jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
            if jump and int(jump[1], 16) < address:
                spans.append((int(jump[1], 16), address))
        spans.sort(key=lambda span: span[1] - span[0])
        return [[text for at, text in self.code.items() if low <= at <= high] for low, high in spans]

    def loops_with(self, mnemonic: str, times: int) -> list[list[str]]:
        """The loops that hold an instruction exactly so many times."""
        return [loop for loop in self.loops() if sum(mnemonic in text for text in loop) == times]


def compile_cuda(source: Path, out: Path, arch: str = "90a") -> list[Kernel]:
    """Every kernel of ``source`` for one architecture, device code alone; AssertionError where it does not compile."""
    command = [NVCC, "-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
               "-Xptxas", "-v", "-cubin", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}",
               *(f"-I{path}" for path in include_paths()), str(source), "-o", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = disassemble(out)
    for part in done.stderr.split("Compiling entry function '")[1:]:
        kernel = kernels[part.split("'", 1)[0]]
        kernel.registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        kernel.shared_bytes = int(shared[1]) if shared else 0
        kernel.spill_bytes = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
    return list(kernels.values())


def disassemble(binary: Path) -> dict[str, Kernel]:
    """Kernels by their mangled names."""
    done = subprocess.run([CUOBJDUMP, "-sass", str(binary)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = {}
    for part in done.stdout.split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", body)
        kernels[name.strip()] = Kernel(name.strip(), {int(at, 16): text for at, text in lines})
    return kernels
