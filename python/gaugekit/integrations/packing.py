"""A directory, plain or packed, as a model whose matrices stay packed in memory."""

from gaugekit.hf.packed_model import load_packed

__all__ = ["load_packed"]
