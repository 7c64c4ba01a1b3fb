"""``load_packed``: a directory as a model whose matrices stay packed, read one tensor at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import nn

from gaugekit.checkpoint import resident
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.hf import loading, packed_files
from gaugekit.hf.quantizer import GaugekitConfig


def load_packed(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a directory, plain or written by ``gaugekit pack``, with its matrices packed; in evaluation mode.

    It is what ``from_pretrained`` with ``GaugekitConfig(packed=True)`` gives, read through no mapping: one tensor is
    read at a time and packed before the next, so memory and address space stay one tensor above the packed model.
    ``dtype`` bfloat16 or float16 (None: what most weights are stored in). ValueError for another dtype, a converted
    directory, or weights that are missing (a bare encoder's pooler may be).
    """
    checkpoint = Checkpoint(loading.directory(path, "path"))
    if checkpoint.config.get("quantization_config"):
        raise ValueError(f"path: expected a plain or packed directory, got a converted one: {path}")
    if dtype is None:
        held = Counter()
        for name in checkpoint.names():
            held[checkpoint.dtype(name)] += checkpoint.bytes(name)
        dtype = held.most_common(1)[0][0]
    if dtype not in resident.DTYPES:
        raise ValueError(f"dtype: expected torch.bfloat16 or torch.float16, got {dtype}")
    with packed_files.without_mapping():
        return loading.model(checkpoint.path, dtype, quantization_config=GaugekitConfig(packed=True))
