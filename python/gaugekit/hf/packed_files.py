"""Lets transformers read packed files: ``from_pretrained`` of a packed directory decodes each tensor as it loads it.

transformers has no registry for the format of weight files; it opens each by the name ``safe_open`` in its own module.
``register`` puts ``open_file`` there, which hands ordinary files to what stood there before and packed ones to
``gaugekit.codec.safe_open``. Whatever transformers does with a file's tensors then works as before: dtypes, devices,
shards of tensor parallelism (only their rows are decoded), quantizers, threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from gaugekit.codec import safe_open
from gaugekit.codec.files.container import seems_packed
from gaugekit.hf.upstream import unfit

try:
    from transformers import modeling_utils
    from transformers.modeling_utils import safe_open as _ordinary
except ImportError as error:
    raise unfit(__name__, error) from error

_mapping: ContextVar[bool] = ContextVar("mapping", default=True)


def register() -> None:
    """Makes transformers read packed files; doing it again changes nothing."""
    modeling_utils.safe_open = open_file


@contextlib.contextmanager
def without_mapping() -> Iterator[None]:
    """Reads ordinary files through gaugekit too, a tensor at a time and without mapping them; this thread only."""
    token = _mapping.set(False)
    try:
        yield
    finally:
        _mapping.reset(token)


def open_file(filename: str | os.PathLike, framework: str = "pt", device: Any = "cpu", **options: Any) -> Any:
    """The opened file: through gaugekit where it is packed or not to be mapped, else as transformers opens it."""
    if not _mapping.get() or seems_packed(filename):
        return safe_open(filename, framework, device)
    return _ordinary(filename, framework=framework, device=device, **options)
