"""``register``: enters what is ours in vLLM's registries, by name where vLLM takes names."""

from __future__ import annotations

import functools
import sys
from typing import Any

NAME = "gaugekit"
HERE = "gaugekit.integrations.vllm"
SAS = "gaugekit_sas"  # the model type of SASConfig
# Looked up when a model of that name is loaded, and not before.
MODELS = {
    "GaugekitForCausalLM": f"{HERE}.converted:GaugekitForCausalLM",
    "SASForCausalLM": f"{HERE}.sas:SASForCausalLM",
}


@functools.cache
def register() -> None:
    """Lets vLLM load packed directories (``--load-format gaugekit``), converted, sliced and SAS models.

    Once a process: calling it again changes nothing. Nothing of gaugekit's is imported but classes that vLLM wants at
    once, no model and no codec, and no GPU is touched. ImportError without vLLM.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.model_loader import register_model_loader
        from vllm.model_executor.models import ModelRegistry
    except ImportError as error:
        raise ImportError(f"{HERE} needs vLLM: {error}") from error
    from gaugekit.integrations.vllm.loader import PackedLoader
    from gaugekit.integrations.vllm.quantization import Forms

    register_model_loader(NAME)(PackedLoader)
    register_quantization_config(NAME)(Forms)
    for name, place in MODELS.items():
        ModelRegistry.register_model(name, place)
    _register_sas()


def _register_sas() -> None:
    """Lets AutoConfig find SASConfig when a directory of that type is opened."""
    from vllm.transformers_utils.config import AutoConfig

    if (sas := sys.modules.get("gaugekit.hf.sas")) is not None:
        sas.register()
    else:
        AutoConfig.register(SAS, Later, exist_ok=True)


class Later:
    """Stands for SASConfig, which brings transformers' models along, until a directory needs it."""

    model_type = SAS

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The SASConfig of a config.json."""
        from gaugekit.hf import sas

        sas.register()
        return sas.SASConfig.from_dict(config_dict, **options)
