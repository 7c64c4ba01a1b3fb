"""Attention whose keys and values are both read from one cached tensor."""

from gaugekit.ops.single_cache_attention import cuda  # noqa: F401 - it registers its operator
from gaugekit.ops.single_cache_attention.choice import use_core
from gaugekit.ops.single_cache_attention.operator import single_cache_attention

__all__ = ["single_cache_attention", "use_core"]
