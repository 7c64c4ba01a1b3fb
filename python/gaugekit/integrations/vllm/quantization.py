"""``quantization_config`` of converted and sliced directories, as vLLM reads it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

NAME = "gaugekit"
ARCHITECTURE = "GaugekitForCausalLM"
KNOWN = {"quant_method", "version", "modules", "sliced"}


class Forms(QuantizationConfig):
    """Which modules of a model have which form, and how its stream is sliced (docs/loading.md).

    Nothing is quantised; every layer that vLLM makes stays unquantised. The forms are put in place by
    ``GaugekitForCausalLM``, to which such a directory is led as soon as vLLM reads its config.json. Any other model
    class would ignore them: it is refused.
    """

    def __init__(self, modules: dict[str, dict], sliced: dict | None):
        super().__init__()
        self.modules, self.sliced = modules, sliced
        self.installed = False  # set by the model that put the forms in place

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Forms:
        """Of the entry in config.json; ValueError where vLLM could not compute what it describes."""
        from gaugekit.checkpoint.version import VERSION  # brings the codec along

        if config.get("version") != VERSION:
            raise ValueError(
                f"quantization_config: expected version {VERSION}, got {config.get('version')!r}; "
                "a newer gaugekit wrote this checkpoint, and reads it"
            )
        if config.get("neutreno") is not None:
            raise ValueError(
                "quantization_config: neutreno: expected none, since vLLM's attention does not add its term; "
                "gaugekit serve does"
            )
        if unknown := set(config) - KNOWN - {"neutreno"}:
            raise ValueError(f"quantization_config: {', '.join(sorted(unknown))}: not known for vLLM")
        modules = config.get("modules")
        if not isinstance(modules, dict):
            raise ValueError(f"quantization_config: expected modules by name, got {modules!r}")
        return cls(modules, config.get("sliced"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Leads a directory of ours to our model class: vLLM asks here, having read config.json and no weight."""
        if hf_quant_cfg.get("quant_method") != NAME:
            return None
        if hf_config is not None and getattr(hf_config, "architectures", None):
            hf_config.architectures = [ARCHITECTURE]
        return NAME

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        """Of a linear layer the ordinary method; ValueError where no forms were put in place before."""
        if not self.installed:
            raise ValueError(
                f"{prefix}: this directory was converted by gaugekit, and the model class that vLLM chose does not "
                f'know its forms; choose --hf-overrides \'{{"architectures": ["{ARCHITECTURE}"]}}\', or convert with '
                "--dense"
            )
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
