"""pack, unpack and save_file: .safetensors files and directories of them, never over the input."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch

from .. import staging
from ..ops import rans
from ..report import Report
from . import container, directory, stream
from .container import SUFFIX, CorruptFile, Packed, naming
from .pieces import read_at
from .stream import MEMORY_BYTES, Crew

Progress = Callable[[int, int], None] | None


def pack(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    model: int | None = None,
    verify: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    resume: bool = True,
    progress: Progress = None,
) -> Report:
    """Packs the .safetensors file ``source`` into ``target``, or every one in a directory, the rest being copied.

    Tensors of a dtype that ``encode`` takes are coded where that makes them smaller, everything else is stored as it
    is; ``model`` is that of ``encode`` for the bfloat16 ones (2: smaller, slower). ``unpack`` restores each file byte
    for byte. A packed file is a valid .safetensors file (docs/format.md), and a packed model directory loads once
    ``gaugekit.integrations.transformers`` is imported. With ``verify`` each packed file is restored again in memory and
    its SHA-256 compared with the source's before it is given its name.

    Memory: ``memory_bytes`` of buffers (64 MiB or more), whatever the tensors' sizes. Nothing is written over the
    input. A file is written beside its place, flushed and renamed. A directory grows in ``<target>.partial``; after a
    kill the same call goes on behind the last whole file, unless ``resume`` is False. ``progress(done, total)`` counts
    the source's bytes, twice with ``verify``.

    Report: bytes_before, bytes_after and ratio of the .safetensors files, bits_per_weight over them (headers included),
    verified, seconds. ValueError for a source that is missing, packed already or holds no .safetensors, CorruptFile for
    one that is damaged, OSError when the disk is too small.
    """
    if model not in (None, *rans.MODELS[torch.bfloat16]):
        raise ValueError(f"model: expected None or one of {rans.MODELS[torch.bfloat16]}, got {model!r}")
    job = {"verb": "pack", "format": container.VERSION, "model": model, "verify": verify}
    with Crew(memory_bytes) as crew:
        one = partial(_pack_file, crew=crew, model=model, verify=verify)
        report = _run(job, _packable, one, source, target, resume, 2 if verify else 1, progress)
    weights, after = report.fields.pop("weights"), report["bytes_after"]
    report.fields["ratio"] = after / report["bytes_before"]
    report.fields["bits_per_weight"] = 8 * after / weights if weights else 0.0
    report.fields["verified"] = verify
    report.fields["seconds"] = report.fields.pop("seconds")
    return report


def unpack(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    memory_bytes: int = MEMORY_BYTES,
    resume: bool = True,
    progress: Progress = None,
) -> Report:
    """Restores what ``pack`` was given, byte for byte: a file, or a directory of files.

    Every checksum is verified; damage raises CorruptFile and leaves no output behind. Memory, resuming and progress as
    for ``pack``. ValueError for an ordinary .safetensors file. Report: bytes_before, bytes_after (of the .safetensors
    files), seconds.
    """
    job = {"verb": "unpack", "format": container.VERSION}
    with Crew(memory_bytes) as crew:
        one = partial(_unpack_file, crew=crew)
        report = _run(job, _unpackable, one, source, target, resume, 1, progress)
    del report.fields["weights"]
    return report


def save_file(
    tensors: dict[str, torch.Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Writes ``tensors`` to a packed file: ``safetensors.torch.save_file``, and ``pack`` of what that wrote.

    ``unpack`` of it gives the file that safetensors would have written. The file is written beside its place, flushed
    and renamed. ValueError for what is no {name: tensor}, for metadata that is no {str: str}, for a dtype that
    .safetensors lacks, and for tensors that share memory: they would not when they are loaded.
    """
    flat = {name: _stored(name, tensor) for name, tensor in _checked(tensors, metadata).items()}
    names = {dtype: name for name, dtype in container.DTYPES.items()}
    raw = container.render_plain({n: (names[t.dtype], tuple(t.shape)) for n, t in tensors.items()}, metadata)
    path = Path(path).resolve()
    with Crew() as crew, written(path) as out:
        stream.pack(
            container.parse_header(raw),
            lambda entry, start, stop: flat[entry.name][start:stop].numpy(),
            out,
            crew,
            None,
            lambda size: None,
        )


def _checked(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> dict[str, torch.Tensor]:
    if not isinstance(tensors, dict):
        raise ValueError(f"tensors: expected a dict of tensors by name, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"tensors: expected tensors by name, got {name!r}: {type(tensor).__name__}")
    if "__metadata__" in tensors:
        raise ValueError("tensors: expected names other than '__metadata__', got it")
    if metadata is not None and (
        not isinstance(metadata, dict)
        or "gaugekit" in metadata
        or not all(isinstance(text, str) for item in metadata.items() for text in item)
    ):
        raise ValueError(f"metadata: expected a dict of strings without 'gaugekit', got {metadata!r}")
    spans = []
    for name, tensor in tensors.items():
        if tensor.dtype not in container.DTYPES.values():
            raise ValueError(f"tensors: {name!r} has dtype {tensor.dtype}, which .safetensors lacks")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"tensors: expected dense tensors with data, {name!r} is none")
        if tensor.numel():
            last = sum(
                (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            begin = tensor.data_ptr()
            spans.append((str(tensor.device), begin, begin + (last + 1) * tensor.itemsize, name))
    spans.sort()
    for (device, _, end, name), (other_device, begin, _, other) in pairwise(spans):
        if device == other_device and begin < end:
            raise ValueError(f"tensors: {name!r} and {other!r} share memory; leave one out, or clone it")
    return tensors


def _stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, as they stand in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _run(
    job: dict,
    plan: Callable,
    convert: Callable,
    source,
    target,
    resume: bool,
    passes: int,
    progress: Progress,
) -> Report:
    """One file or a directory; ``plan(path)`` reads and checks a file's header and says how many bytes may be written,
    ``convert(path, place, advance)`` does the work and returns (bytes before, after, weights).
    """
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    if not source.exists():
        raise ValueError(f"source: expected a {SUFFIX} file or a directory, but {source} does not exist")
    whole, place = source.resolve(), target.resolve()
    if place == whole or (target.exists() and source.samefile(target)):
        raise ValueError(f"target: expected another path than source, got {target} for both")
    if whole.is_dir():
        return directory.convert(job, plan, convert, whole, place, resume, passes, progress, started)
    if place.is_dir():
        raise ValueError(f"target: expected a file name, got the directory {target}")
    needed = plan(whole)
    place.parent.mkdir(parents=True, exist_ok=True)
    directory.check_space(place, needed, shutil.disk_usage(place.parent).free)
    counts = convert(whole, place, directory.counter(passes * whole.stat().st_size, progress))
    fields = dict(zip(("bytes_before", "bytes_after", "weights"), counts, strict=True))
    return Report(job["verb"], {**fields, "seconds": time.perf_counter() - started})


def _packable(path: Path) -> int:
    with path.open("rb") as file, naming(path):
        found = container.read(file)
    if isinstance(found, Packed):
        raise ValueError(f"source: expected an ordinary {SUFFIX} file, but {path} is packed already")
    return 8 + container.packed_header_bytes(found) + found.file_bytes - found.data_start


def _unpackable(path: Path) -> int:
    return _packed(path).original.file_bytes


def _packed(path: Path) -> Packed:
    with path.open("rb") as file, naming(path):
        found = container.read(file)
    if not isinstance(found, Packed):
        raise ValueError(f"source: expected a packed file, but {path} is an ordinary {SUFFIX} file")
    return found


def _pack_file(
    source: Path, target: Path, advance: Callable, *, crew: Crew, model: int | None, verify: bool
) -> tuple[int, int, int]:
    with source.open("rb") as file, naming(source), written(target, like=source) as out:
        original = container.read(file)

        def read(entry: container.Entry, start: int, stop: int):
            return read_at(file, original.data_start + entry.begin + start, stop - start)

        advance(original.data_start)
        after = stream.pack(original, read, out, crew, model, advance)
        out.flush()
        if verify:
            _verify(source, out, crew, advance)
    return original.file_bytes, after, sum(entry.weights for entry in original.entries)


def _verify(source: Path, packed: BinaryIO, crew: Crew, advance: Callable) -> None:
    """CorruptFile unless what was written to ``packed`` restores ``source``: nothing is published then."""
    expected = crew.beside(staging.sha256, source)
    with open(packed.name, "rb") as file:
        header = container.read(file)
        found = stream.sha256(stream.restored(file, header, crew, lambda size: None))
    advance(header.original.file_bytes)
    if found != expected.result():
        raise CorruptFile("what was written does not restore it: the disk, the memory or the processor erred")


def _unpack_file(source: Path, target: Path, advance: Callable, *, crew: Crew) -> tuple[int, int, int]:
    with source.open("rb") as file, naming(source), written(target, like=source) as out:
        packed = container.read(file)
        advance(packed.stored.data_start)
        for piece in stream.restored(file, packed, crew, advance):
            out.write(piece)
    weights = sum(entry.weights for entry in packed.original.entries)
    return packed.stored.file_bytes, packed.original.file_bytes, weights


@contextmanager
def written(target: Path, like: Path | None = None) -> Iterator[BinaryIO]:
    """A hidden sibling that becomes ``target`` when all was written and reached the disk, and is removed otherwise;
    what a killed process left of one is written over. ``like`` is the file whose permissions it takes.
    """
    path = target.with_name(f".{target.name}.gaugekit-partial")
    with open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)) as file:
        held = staging.lock(file) and path.exists()
        # A process that had the lock may have given the file its name meanwhile: then it is not ours, either.
        if not held or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise ValueError(f"target: another process is writing {str(path)!r}")
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if like is not None:
                shutil.copymode(like, path)
            os.replace(path, target)
            staging.sync(target.parent)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
