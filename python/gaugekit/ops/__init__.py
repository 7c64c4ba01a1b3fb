"""Operators: schema, composition of torch operators, fake, autograd and public function, one file a stem."""

from gaugekit.ops import packed_linear, shaped_attention, shaped_attention_fused, shaped_combine

__all__ = ["packed_linear", "shaped_attention", "shaped_attention_fused", "shaped_combine"]
