"""The coder's C++ (``_codec.abi3.so``), called through ctypes: it needs no torch."""

from __future__ import annotations

import ctypes
import functools

from gaugekit import _build
from gaugekit._build import Backend

DATA, SIZE, INT, SENTENCE = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p
SIGNATURES = {  # as csrc/codec/codec.cpp has them: what comes back, then what goes in
    "gaugekit_rans_room": (SIZE, SIZE, INT, INT, INT),
    "gaugekit_rans_encode": (SENTENCE, DATA, SIZE, INT, INT, INT, DATA, INT, DATA, DATA, INT, INT),
    "gaugekit_rans_open": (SENTENCE, DATA, SIZE, DATA),
    "gaugekit_rans_decode": (SENTENCE, DATA, SIZE, SIZE, SIZE, DATA, INT, INT),
    "gaugekit_crc32c": (ctypes.c_uint32, DATA, SIZE, ctypes.c_uint32),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Its functions; None, after a warning, where it is missing. ImportError where GAUGEKIT_REQUIRE asks for it, by its
    name or as a part of what is C++ ("cpu").
    """
    found, backend = _loaded()
    if found is None:
        if {"codec", "cpu"} & set(_build.required()):
            _build.refuse(backend)
        _build.warn(backend, "C++", stacklevel=2)
    return found


def backend() -> Backend:
    """Whether it is there, else why not."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, Backend]:
    if (missing := _build.missing("codec")) is not None:
        return None, missing
    path = _build.place("codec")
    try:
        found = ctypes.CDLL(str(path))
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        why = f"{path.name} does not load: {_build.reasons(error)}"
        return None, Backend("codec", False, why, _build.REBUILD, error)
    return found, Backend("codec", True)
