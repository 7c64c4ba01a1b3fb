"""save_file: tensors straight to a packed file, as safetensors would save them and ``pack`` would pack that."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import torch

from gaugekit.codec.files import header, stream
from gaugekit.codec.files.stream import Crew
from gaugekit.codec.tensors.dtypes import NAMES
from gaugekit.files.durable import written
from gaugekit.files.places import check_place, check_space, placed


def save_file(
    tensors: dict[str, torch.Tensor],
    path: str | os.PathLike,
    metadata: dict[str, str] | None = None,
    *,
    symbols: str | None = None,
) -> None:
    """Writes ``tensors`` to a packed file: ``safetensors.torch.save_file``, and ``pack`` of what that wrote,
    with the same ``symbols``.

    ``unpack`` of it gives the file that safetensors would have written. The file is written beside its place, flushed
    and renamed. ValueError for what is no {name: tensor}, for metadata that is no {str: str}, for a dtype that
    .safetensors lacks, and for tensors that share memory: they would not when they are loaded.
    """
    stream.check_symbols(symbols)
    flat = {name: _stored(tensor) for name, tensor in _checked(tensors, metadata).items()}
    raw = header.render_plain({n: (NAMES[t.dtype], _shape(t)) for n, t in tensors.items()}, metadata)
    original = header.parse_header(raw)
    slash, path = os.fspath(path).endswith(("/", os.sep)), Path(path)
    check_place(path)
    if slash or path.is_dir():
        raise ValueError(f"path: expected a file name, got the directory {path}")
    path = placed(path)
    check_space(path, stream.most_bytes(original))
    with Crew() as crew, written(path) as out:
        stream.pack(
            original,
            lambda entry, start, stop, room: flat[entry.name][start:stop].numpy(),
            out,
            crew,
            symbols,
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
        or not all(isinstance(text, str) for item in metadata.items() for text in item)
    ):
        raise ValueError(f"metadata: expected a dict of strings, got {metadata!r}")
    for text in (*tensors, *(text for item in (metadata or {}).items() for text in item)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"tensors, metadata: expected Unicode text, got {text!r}") from None
    spans = []
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"tensors: {name!r} has dtype {tensor.dtype}, which .safetensors lacks")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"tensors: expected dense tensors with data, {name!r} is none")
        if not tensor.dim() and header.BITS[NAMES[tensor.dtype]] < 8:
            raise ValueError(
                f"tensors: {name!r} has dtype {tensor.dtype}, which needs a dimension to be stored"
            )
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


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, as they stand in a file; a view that conjugates or negates does so now."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    if plain.itemsize == 1:  # torch copies some types of a byte only as such
        plain = plain.view(torch.uint8)
    return plain.contiguous().reshape(-1).view(torch.uint8)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape as a header says it: an element of torch may hold two of the file's."""
    shape, bits = tuple(tensor.shape), header.BITS[NAMES[tensor.dtype]]
    return shape if bits >= 8 else (*shape[:-1], shape[-1] * 8 * tensor.itemsize // bits)
