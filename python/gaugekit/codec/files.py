"""pack and unpack: .safetensors files and directories of them, a tensor at a time, never over the input."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..ops import rans
from ..ops.rans import MODELS
from ..report import Report
from . import container
from .blob import as_byte_tensor, encode_bytes
from .container import CorruptFile, Entry, naming

Progress = Callable[[int, int], None] | None
PIECE_BYTES = 1 << 24  # what is copied rather than coded is copied in pieces of this size
SUFFIX = ".safetensors"


def pack(source, target, *, model: int | None = None, progress: Progress = None) -> Report:
    """Packs the .safetensors file ``source`` into ``target``, or every one in a directory, the rest being
    copied.

    bfloat16, float16, float32, float8 and int8 tensors are coded where that makes them smaller, everything
    else is stored as it is; ``model`` is that of ``encode`` for the bfloat16 ones (2: smaller, slower).
    ``unpack`` restores each file byte for byte. A packed file is a valid .safetensors file (docs/format.md).
    Nothing is written over the input: a directory goes to a new or empty one outside it.
    ``progress(done_bytes, total_bytes)``. Memory: the largest tensor twice. Report: bytes_before,
    bytes_after and ratio of the .safetensors files, bits_per_weight over them (headers included), seconds.
    ValueError for a source that is missing, packed already or holds no .safetensors, CorruptFile for one
    that is damaged, OSError when the disk is too small.
    """
    if model not in (None, *MODELS[torch.bfloat16]):
        raise ValueError(f"model: expected None or one of {MODELS[torch.bfloat16]}, got {model!r}")
    report = _run("pack", partial(_pack_file, model=model), source, target, progress)
    weights, after = report.fields.pop("weights"), report["bytes_after"]
    report.fields["ratio"] = after / report["bytes_before"]
    report.fields["bits_per_weight"] = 8 * after / weights if weights else 0.0
    report.fields["seconds"] = report.fields.pop("seconds")
    return report


def unpack(source, target, *, progress: Progress = None) -> Report:
    """Restores what ``pack`` was given, byte for byte: a file, or a directory of files.

    Every checksum is verified; damage raises CorruptFile and leaves no output behind. ValueError for an
    ordinary .safetensors file. Report: bytes_before, bytes_after (of the .safetensors files), seconds.
    """
    report = _run("unpack", _unpack_file, source, target, progress)
    del report.fields["weights"]
    return report


def _run(verb: str, convert: Callable, source, target, progress: Progress) -> Report:
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    if not source.exists():
        raise ValueError(f"source: expected a {SUFFIX} file or a directory, but {source} does not exist")
    whole, place = source.resolve(), target.resolve()
    if place == whole or (target.exists() and source.samefile(target)):
        raise ValueError(f"target: expected another path than source, got {target} for both")
    if whole.is_dir() and whole in place.parents:
        raise ValueError(f"target: expected a path outside {source}, got {target}")
    report = Report(verb, {"bytes_before": 0, "bytes_after": 0, "weights": 0})
    if whole.is_dir():
        _convert_directory(convert, whole, place, progress, report)
    else:
        if place.is_dir():
            raise ValueError(f"target: expected a file name, got the directory {target}")
        place.parent.mkdir(parents=True, exist_ok=True)
        _add(report, convert(whole, place, progress))
    report.fields["seconds"] = time.perf_counter() - started
    return report


def _add(report: Report, counts: tuple[int, int, int]) -> None:
    for field, count in zip(("bytes_before", "bytes_after", "weights"), counts, strict=True):
        report.fields[field] += count


def _convert_directory(
    convert: Callable, source: Path, target: Path, progress: Progress, report: Report
) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target: expected a new or empty directory, got {target}")
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    if not any(path.suffix == SUFFIX for path in paths):
        raise ValueError(f"source: expected a directory with {SUFFIX} files, found none in {source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    copied, done = 0, 0
    try:
        shutil.copymode(source, partial)
        for path in paths:
            place = partial / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == SUFFIX:
                before = done
                step = (lambda part, _, base=before: progress(base + part, total)) if progress else None
                try:
                    _add(report, convert(path, place, step))
                except CorruptFile:
                    raise
                except ValueError as error:
                    raise type(error)(f"{path.name}: {error}") from None
            else:
                _copy_file(path, place)
                copied += 1
            done += path.stat().st_size
            if progress:
                progress(done, total)
        os.rename(partial, target)
        _sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if copied:
        report.notes.append(f"{copied} other files were copied as they are.")


def _copy_file(source: Path, target: Path) -> None:
    with _written(target, like=source) as out, source.open("rb") as file:
        shutil.copyfileobj(file, out, PIECE_BYTES)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _written(target: Path, like: Path) -> Iterator[BinaryIO]:
    """A temporary sibling that becomes ``target`` when all was written and reached the disk, and is removed
    otherwise.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(like, name)
        os.replace(name, target)
        _sync_directory(target.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed} bytes are needed beside {target.name}, {free} are free",
            str(target.parent),
        )


def _read(file: BinaryIO, start: int, size: int) -> torch.Tensor:
    buffer = np.empty(size, np.uint8)
    file.seek(start)
    if file.readinto(buffer) != size:
        raise CorruptFile("the file ends within a tensor")
    return torch.from_numpy(buffer)


def _copy(source: BinaryIO, start: int, size: int, out: BinaryIO) -> int:
    """Copies [start, start + size) to where ``out`` stands; returns the crc32c."""
    crc = 0
    for offset in range(0, size, PIECE_BYTES):
        piece = _read(source, start + offset, min(PIECE_BYTES, size - offset))
        crc = rans.crc32c(piece, crc)
        out.write(piece.numpy())
    return crc


def _pack_file(source: Path, target: Path, progress: Progress, model: int | None) -> tuple[int, int, int]:
    with source.open("rb") as file, naming(source):
        original = container.read(file)
        if isinstance(original, container.Packed):
            raise ValueError(f"source: expected an ordinary {SUFFIX} file, got one that is packed already")
        reserved = container.packed_header_bytes(original)
        _check_space(target, 8 + reserved + original.file_bytes - original.data_start)
        stored: list[tuple[Entry, str, int]] = []
        rest: list[Entry] = []
        total, done, cursor = original.file_bytes, original.data_start, 0

        def store(entry: Entry, dtype: str, shape: tuple, size: int, codec: str, crc: int) -> None:
            nonlocal cursor, done
            stored.append((Entry(entry.name, dtype, shape, cursor, cursor + size), codec, crc))
            cursor += size
            done += entry.size
            if progress:
                progress(done, total)

        with _written(target, like=source) as out:
            out.seek(8 + reserved)
            for entry in original.entries:
                blob = None
                if container.codable(entry.dtype) and entry.size:
                    data = _read(file, original.data_start + entry.begin, entry.size).view(
                        container.DTYPES[entry.dtype]
                    )
                    blob = encode_bytes(
                        data.view(entry.shape), model=model if entry.dtype == "BF16" else None
                    )
                if blob is None or blob.numel() >= entry.size:
                    rest.append(entry)
                    continue
                out.write(blob.numpy())
                store(entry, "U8", (blob.numel(),), blob.numel(), "rans", rans.crc32c(blob))
            # Blobs are multiples of 16 bytes: with the widest first, every tensor is aligned to its own elements.
            for entry in sorted(rest, key=lambda e: -container.ITEM_BYTES.get(e.dtype, 1)):
                crc = _copy(file, original.data_start + entry.begin, entry.size, out)
                store(entry, entry.dtype, entry.shape, entry.size, "raw", crc)
            header = container.render_packed(original, stored, reserved)
            out.seek(0)
            out.write(len(header).to_bytes(8, "little") + header)
    return original.file_bytes, 8 + reserved + cursor, sum(entry.weights for entry in original.entries)


def _unpack_file(source: Path, target: Path, progress: Progress) -> tuple[int, int, int]:
    with source.open("rb") as file, naming(source):
        packed = container.read(file)
        if not isinstance(packed, container.Packed):
            raise ValueError(f"source: expected a packed file, got an ordinary {SUFFIX} file")
        original, start = packed.original, packed.stored.data_start
        places = {entry.name: entry for entry in packed.stored.entries}
        _check_space(target, original.file_bytes)
        total, done = packed.stored.file_bytes, start
        with _written(target, like=source) as out:
            out.write(len(original.raw).to_bytes(8, "little") + original.raw)
            for entry in original.entries:
                place, (codec, crc) = places[entry.name], packed.tensors[entry.name]
                if codec == "raw":
                    found = _copy(file, start + place.begin, place.size, out)
                else:
                    blob = _read(file, start + place.begin, place.size)
                    found = rans.crc32c(blob)
                if found != crc:
                    raise CorruptFile(f"tensor {entry.name!r}: the checksum of its stored bytes is wrong")
                if codec == "rans":
                    out.write(_decoded(blob, entry).numpy())
                done += place.size
                if progress:
                    progress(done, total)
    return packed.stored.file_bytes, original.file_bytes, sum(entry.weights for entry in original.entries)


def _decoded(blob: torch.Tensor, entry: Entry) -> torch.Tensor:
    """The tensor's bytes; nothing is allocated before the blob agrees with the original header."""
    dtype, shape = rans.open_blob(as_byte_tensor(blob))
    if dtype != container.DTYPES[entry.dtype] or tuple(shape) != entry.shape:
        raise CorruptFile(
            f"tensor {entry.name!r}: the header says {entry.dtype} {list(entry.shape)}, "
            f"its blob {dtype} {list(shape)}"
        )
    out = torch.empty(shape, dtype=dtype)
    rans.decode(blob, 0, out.numel(), out)
    return out.reshape(-1).view(torch.uint8)
