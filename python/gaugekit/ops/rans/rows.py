"""``gaugekit::rans_decode_rows``: many chunks of many blobs in one launch, the form in which a GPU decodes.

A row of 48 bytes (csrc/common/rans_lane.h, ``ChunkRow``) says where a chunk begins in the packed bytes, what it
holds and where its elements go. On the CPU the same code runs lane by lane: correct and slow, to test what the GPU
runs.
"""

from __future__ import annotations

import numpy as np
import torch

from gaugekit import _library
from gaugekit.coder import composition, header
from gaugekit.ops.rans import operator as rans

ROW = np.dtype(
    [
        ("in", "<u8"),
        ("out", "<u8"),
        ("n", "<u4"),
        ("from", "<u4"),
        ("to", "<u4"),
        ("length", "<u4"),
        ("words", "<u4", 2),
        ("symbols", "<u2"),
        ("method", "u1"),
        ("constant", "u1"),
        ("width", "u1"),
        ("kind", "u1"),
        ("reserved", "<u2"),
    ]
)
ELEMENT_OF_WIDTH = {1: 6, 2: 1, 4: 3}  # any type of that width: rows say nothing of types


# How a lane finds its symbol: in the buckets of an alias table, or in a table of all slots. No GPU has chosen yet; by
# its machine code the second takes a third of the instructions a symbol, and its table is made by all threads.
VARIANTS = {"buckets": 0, "slots": 1}
VARIANT = VARIANTS["slots"]


def _contradicts(row: np.ndarray, packed_bytes: int, out_bytes: int) -> bool:
    """Whether a row does not fit the sizes of what it names, as ``place_sections`` (csrc) says."""
    start, out, n, first, last, length = (
        int(row[name]) for name in ("in", "out", "n", "from", "to", "length")
    )
    width, kind, symbols = int(row["width"]), int(row["kind"]), int(row["symbols"])
    if width not in ELEMENT_OF_WIDTH or kind > 2 or (kind == 2 and width != 2) or symbols > 256:
        return True
    if start % 16 or start + length > packed_bytes or not first <= last <= n or out % width:
        return True
    if out + (last - first) * width > out_bytes:
        return True
    if not row["method"]:
        return header.padded(n * width) != length
    plane = -(-n // 64) * 48 if kind == 2 else n
    constant = [int(row["constant"]) >> i & 1 for i in range(width - 1)]
    sections = 256 + header.padded(4 * symbols) + sum(header.padded(2 * int(words)) for words in row["words"])
    return symbols == 0 or sections + sum(header.padded(1 if bit else plane) for bit in constant) != length


def _decode_row(packed: np.ndarray, row: np.ndarray) -> np.ndarray:
    """uint8 elements [from, to) of one row."""
    start, n, width = int(row["in"]), int(row["n"]), int(row["width"])
    chunk = packed[start : start + int(row["length"])]
    cut = slice(int(row["from"]) * width, int(row["to"]) * width)
    if not row["method"]:
        return chunk[cut]
    entry = np.zeros(1, header.ENTRY)
    for name in ("symbols", "constant", "words"):
        entry[name] = row[name]
    entry["method"] = 1
    element, kind = ELEMENT_OF_WIDTH[width], int(row["kind"])
    blob = composition.Blob(chunk, element, kind, 0, n, (n,), entry, [0, n])
    return composition.decode_whole(blob, 0)[cut]


def _decode_rows(packed, rows, out, damaged, variant=0):
    data = packed.cpu().numpy()
    for i, row in enumerate(rows.cpu().numpy().view(ROW)):
        try:
            if _contradicts(row, data.size, out.numel()):
                raise RuntimeError("a row contradicts the sizes")
            piece = _decode_row(data, row)
        except RuntimeError:
            damaged[i] = 1
            continue
        place = int(row["out"])
        out[place : place + piece.size].copy_(torch.from_numpy(piece.copy()))
        damaged[i] = 0


_library.define(
    "rans_decode_rows(Tensor packed, Tensor rows, Tensor(a!) out, Tensor(b!) damaged, int variant=0) -> ()",
    _decode_rows,
    lambda packed, rows, out, damaged, variant=0: None,
)


def rows_of(blob: torch.Tensor, start: int, stop: int, place: int, out: int) -> np.ndarray:
    """The rows [chunks] of elements [start, stop) of ``blob``, a uint8 vector that will lie at byte ``place`` of the
    packed bytes and whose elements go to byte ``out``.

    Header, index and the coded bytes' checksums are verified: CorruptFile.
    """
    rans.open_blob(blob)
    opened = header.header_of(blob.numpy())
    starts = np.array(composition.chunk_starts(opened.count, opened.chunk_log2), np.int64)
    index = blob[opened.index_begin : opened.index_end].numpy().copy().view(header.ENTRY)
    wanted = np.flatnonzero((starts[:-1] < stop) & (start < starts[1:]))
    width = composition.WIDTHS[opened.element]
    first, last, entries = starts[:-1][wanted], starts[1:][wanted], index[wanted]
    for entry in entries:
        at = int(entry["offset"])
        if rans.crc32c(blob[at : at + int(entry["length"])]) != int(entry["crc_coded"]):
            raise rans.CorruptFile("not a sound coded blob: a chunk's coded bytes are damaged")
    rows = np.zeros(wanted.size, ROW)
    for name in ("length", "words", "symbols", "method", "constant"):
        rows[name] = entries[name]
    rows["in"], rows["n"], rows["width"] = entries["offset"] + np.uint64(place), last - first, width
    rows["from"], rows["to"] = np.maximum(start - first, 0), np.minimum(stop, last) - first
    rows["out"] = out + width * (np.maximum(first, start) - start)
    rows["kind"] = np.where(entries["method"] == 2, rans.KINDS["exponent"], opened.kind)
    return rows


def decode_rows(
    packed: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, damaged: torch.Tensor, variant: int = VARIANT
) -> None:
    """Every row of ``rows`` uint8 [48 · chunks] from ``packed`` uint8 into ``out`` uint8, in one launch.

    ``damaged`` int32 [chunks] becomes 1 where a chunk did not end as a sound one does, else 0. Nothing is
    synchronised: on a GPU the call only adds to the current stream, and a CUDA graph may hold it. ``variant``: one of
    ``VARIANTS``; all give the same bytes.
    """
    torch.ops.gaugekit.rans_decode_rows(packed, rows, out, damaged, variant)
