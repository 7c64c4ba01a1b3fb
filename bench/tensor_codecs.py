"""Rivals from PyPI that code bf16 tensors, each None where it is not installed: functions from bytes to coded bytes and
back to bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Codec(NamedTuple):
    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes], bytes]


def openzl(coder: str = "Huffman") -> Codec | None:
    """OpenZL with its node for bf16: signs and mantissas as they are, exponents by "Huffman" or "Fse"."""
    try:
        import openzl.ext as zl
    except ImportError:
        return None
    compressor = zl.Compressor()
    compressor.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
    exponent = getattr(zl.graphs, coder)()
    graph = zl.nodes.BFloat16Deconstruct()(compressor, sign_frac=zl.graphs.Store(), exponent=exponent)
    compressor.select_starting_graph(graph)

    def encode(raw: bytes) -> bytes:
        context = zl.CCtx()
        context.ref_compressor(compressor)
        return context.compress([zl.Input(zl.Type.Numeric, np.frombuffer(raw, np.uint16))])

    def decode(coded: bytes) -> bytes:
        return zl.DCtx().decompress(coded)[0].content.as_nparray()

    return Codec(encode, decode)


def bigsmall(count: int) -> Codec | None:
    """BigSmall's rANS for tensors of ``count`` numbers. It codes sign and exponent together, by a mantissa bit too."""
    try:
        from bigsmall.codec_registry import get_codec
    except ImportError:
        return None
    encode, decode = get_codec("bf16_se_rans")
    return Codec(lambda raw: encode(raw)[0], lambda coded: decode(coded, {}, count))
