"""The system's libhtscodecs (rANS of CRAM files) through ctypes, with the split and merge that bf16 needs around it."""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

INTERLEAVED = 4  # RANS_ORDER_X32, order 0: 32 lanes, the layout of its vector code
SETS = {"scalar": 0, "AVX2": 0x202, "best": 0x707}  # rans_set_cpu: encoder's and decoder's instruction sets

PASSES = """
#include <stddef.h>
#include <stdint.h>
void split(const uint16_t* x, size_t n, uint8_t* exponent, uint8_t* rest) {
  for (size_t i = 0; i < n; ++i) exponent[i] = x[i] >> 7, rest[i] = (x[i] >> 8 & 0x80) | (x[i] & 0x7F);
}
void merge(const uint8_t* exponent, const uint8_t* rest, size_t n, uint16_t* x) {
  for (size_t i = 0; i < n; ++i) x[i] = (rest[i] & 0x80) << 8 | exponent[i] << 7 | (rest[i] & 0x7F);
}
"""


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Htscodecs:
    """bf16 values, uint16 [n], to coded exponents and raw rest, and back; every buffer is made once."""

    def __init__(self, values: np.ndarray):
        name, compiler = ctypes.util.find_library("htscodecs"), shutil.which("cc") or shutil.which("g++")
        if name is None or compiler is None:
            raise OSError("libhtscodecs or a C compiler is not installed")
        self._codec = ctypes.CDLL(name)
        for function in ("rans_compress_to_4x16", "rans_uncompress_to_4x16"):
            getattr(self._codec, function).restype = ctypes.c_void_p
        self._codec.rans_compress_bound_4x16.restype = ctypes.c_uint
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder) / "passes.c", Path(folder) / "passes.so"
            source.write_text(PASSES)
            command = [compiler, "-x", "c", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", binary]
            subprocess.run(command, check=True, capture_output=True)
            self._passes = ctypes.CDLL(str(binary))
        self._values, self._count = values, ctypes.c_size_t(values.size)
        self._exponent, self._rest, self._decoded = (np.zeros(values.size, np.uint8) for _ in range(3))
        self._coded = np.zeros(self._codec.rans_compress_bound_4x16(values.size, INTERLEAVED), np.uint8)
        self._size = ctypes.c_uint()
        self.out = np.zeros_like(values)

    @property
    def coded_bytes(self) -> int:
        return self._size.value + self._rest.size

    def encode(self, instructions: str) -> None:
        self._codec.rans_set_cpu(SETS[instructions])
        self._passes.split(
            _address(self._values), self._count, _address(self._exponent), _address(self._rest)
        )
        self._size.value = self._coded.size
        if not self._codec.rans_compress_to_4x16(
            _address(self._exponent),
            self._values.size,
            _address(self._coded),
            ctypes.byref(self._size),
            INTERLEAVED,
        ):
            raise RuntimeError("htscodecs does not encode")

    def decode(self, instructions: str) -> None:
        self._codec.rans_set_cpu(SETS[instructions])
        size = ctypes.c_uint(self._decoded.size)
        if not self._codec.rans_uncompress_to_4x16(
            _address(self._coded), self._size, _address(self._decoded), ctypes.byref(size)
        ):
            raise RuntimeError("htscodecs does not decode")
        self._passes.merge(_address(self._decoded), _address(self._rest), self._count, _address(self.out))
