"""Transformers models made of the blocks that train without value and output matrices."""

from gaugekit.hf.sas import SASForCausalLM, SASForMaskedLM, SASModel
from gaugekit.hf.sas_config import SASConfig

__all__ = ["SASConfig", "SASForCausalLM", "SASForMaskedLM", "SASModel"]
