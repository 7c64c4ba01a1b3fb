"""The tensors of a directory, packed or not, one after the other: what a model of vLLM loads itself from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.codec import safe_open


def weights(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in the safetensors files of ``directory``, in the order of the files.

    A tensor is read, and decoded where it is packed, when it is asked for, through no mapping: nothing is kept of those
    before it. Before the first, ValueError for a directory whose files are missing, damaged or not those of its index;
    at a tensor whose bytes are damaged, CorruptFile, a ValueError that names file and tensor.
    """
    checkpoint = Checkpoint(directory)

    def read() -> Iterator[tuple[str, Tensor]]:
        for file in checkpoint.files:
            with safe_open(checkpoint.path / file) as opened:
                for name in opened.offset_keys():
                    yield name, opened.get_tensor(name)

    return read()
