"""Importing this module lets transformers load what gaugekit wrote: ``AutoModel.from_pretrained(converted)``."""

from gaugekit.hf.packed_model import load_packed
from gaugekit.hf.quantizer import GaugekitConfig, GaugekitQuantizer

__all__ = ["GaugekitConfig", "GaugekitQuantizer", "load_packed"]
