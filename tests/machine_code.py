"""What a program for sm_90 is like, read off its instructions: a disassembly says the same and takes a second."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# The lowest nine bits of an instruction's sixteen bytes, its operation.
STORE_LOCAL, LOAD_LOCAL, TENSOR_CORES = 0x187, 0x183, 0x1F0  # STL, LDL, HGMMA


def tools() -> Path:
    """The folder of the assembler and its companions; they come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def describe(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack, spilling instructions and tensor-core products."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools() / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    operations = np.concatenate(list(_operations(cubin)))
    spills = int(np.isin(operations, (STORE_LOCAL, LOAD_LOCAL)).sum())
    tensor_cores = int((operations == TENSOR_CORES).sum())
    return {"registers": registers, "stack": stack, "spills": spills, "hgmma": tensor_cores}


def _operations(cubin: bytes) -> Iterator[np.ndarray]:
    """Of each section of an ELF file that holds instructions."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_bytes, entries = struct.unpack_from("<HH", cubin, 58)
    for entry in range(entries):
        _, kind, flags, _, begin, size = struct.unpack_from("<IIQQQQ", cubin, table + entry * entry_bytes)
        if kind == 1 and flags & 4:  # of the program, and executable
            yield np.frombuffer(cubin, "<u8", size // 8, begin)[::2] & 0x1FF
