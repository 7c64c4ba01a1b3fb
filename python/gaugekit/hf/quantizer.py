"""Importing this module lets transformers load what gaugekit wrote: ``AutoModel.from_pretrained(converted)``.

It registers a quantizer named "gaugekit" (transformers' word for "modules of another shape"): before the weights are
read, the modules that ``config.json`` lists under ``quantization_config`` are replaced by their forms; the weights then
load by name. ``save_pretrained`` writes the same layout again. It also registers the attention function "gaugekit",
which a loaded model uses unless ``attn_implementation`` asks for another, the models of ``integrations.sas``, and the
reading of packed files.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from gaugekit.hf.upstream import unfit

try:
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils import logging
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise unfit(__name__, error) from error

from gaugekit.checkpoint.install import install, remember
from gaugekit.checkpoint.version import VERSION
from gaugekit.hf import packed_files, parallel, sas, sliced
from gaugekit.hf.attention import interface, probe
from gaugekit.hf.attention.step import AttentionStep
from gaugekit.hf.resident import Packing

NAME = "gaugekit"
logger = logging.get_logger(__name__)


class GaugekitConfig(QuantizationConfigMixin):
    """``quantization_config`` of a converted checkpoint: {"quant_method": "gaugekit", "version": 1, "modules": {...}}.

    ``modules`` maps the name of a module of the base model (no "bert." or "transformer." before it) to its spec,
    {"form": name, "arguments": {...}}. ``neutreno``, where it stands, is the λ of a model that was saved after
    ``gaugekit.fuse(model, neutreno=λ)``; it is fused so again. ``sliced`` is that of a model whose stream was sliced
    (``gaugekit.hf.sliced.Sliced``). ``GaugekitConfig(packed=True)``, given to
    ``from_pretrained`` of a plain directory, keeps its matrices packed in memory instead (docs/resident.md). Raises
    ValueError for a version that is not 1, modules of another shape, or an entry that is not known.
    """

    def __init__(
        self,
        version: int = VERSION,
        modules: dict[str, dict] | None = None,
        quant_method: str = NAME,
        packed: bool = False,
        neutreno: float | list[float] | None = None,
        sliced: dict | None = None,
        **unknown: Any,
    ):
        if version != VERSION:
            raise ValueError(
                f"quantization_config: expected version {VERSION}, got {version!r}; "
                "a newer gaugekit wrote this checkpoint, and reads it"
            )
        if not isinstance(modules, dict) and not (packed and modules is None):
            raise ValueError(f"quantization_config: expected modules by name, got {modules!r}")
        if packed and (modules or sliced):
            other = "modules" if modules else "a sliced model"
            raise ValueError(f"quantization_config: expected either {other} or packed=True, got both")
        if unknown:
            raise ValueError(
                f"quantization_config: expected version and modules, got {', '.join(sorted(unknown))} too"
            )
        self.quant_method = quant_method
        self.version = version
        self.modules = modules or {}
        self.packed = packed
        self.neutreno = neutreno
        self.sliced = sliced

    def to_dict(self) -> dict:
        """What ``config.json`` keeps; packed weights are not written there, so neither is a word about them."""
        absent = {name for name in ("neutreno", "sliced") if getattr(self, name) is None}
        return {name: value for name, value in super().to_dict().items() if name not in {"packed", *absent}}


# calls instead of decorators: a type checker takes what those return for the class
register_quantization_config(NAME)(GaugekitConfig)


class GaugekitQuantizer(HfQuantizer):
    """Puts the forms in place before the weights are read; nothing is lost, so everything else stays allowed."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: GaugekitConfig, **arguments: Any):
        super().__init__(quantization_config, **arguments)
        self.packing = Packing() if quantization_config.packed else None
        self.attention_asked = False

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return self.packing is not None and self.packing.takes(model, param_name)

    def get_quantize_ops(self) -> Packing | None:
        return self.packing

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        super().update_parallel_plan(model, plan)
        sliced = parallel.SLICED if self.quantization_config.sliced is not None else None
        parallel.adapt(model, plan, parallel.PACKED if self.packing is not None else sliced)

    def update_tp_plan(self, config: Any) -> Any:
        """Asked by transformers before 5.23 alone: nothing is cut there, where no style knows our forms."""
        with contextlib.suppress(AttributeError):  # a SAS model's follows from its config
            config.base_model_tp_plan = None
        return config

    def update_attn_implementation(self, config: Any) -> Any:
        self.attention_asked = getattr(config, "_attn_implementation_internal", None) is not None
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **_
    ):
        if self.packing is not None:
            self.packing.check(model.dtype, self.pre_quantized)
        for path in install(model, self.quantization_config.modules, dtype):
            # Some families draw random numbers for the weights of all projections of an attention, which a form may
            # not have; those of a form are read. What the attention itself holds (a mask) has to be made.
            owner = model.get_submodule(path.rpartition(".")[0])
            if not owner._parameters and not owner._buffers:
                owner._is_hf_initialized = True
        if self.quantization_config.sliced is not None:
            sliced.install(model, sliced.Sliced.read(self.quantization_config.sliced), dtype)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_):
        if self.packing is not None:
            self.packing.finish(model)
            # What is packed is seen from the layers; the model saves as the plain one that was read.
            del model.config.quantization_config, model.hf_quantizer
        model.is_quantized = (
            False  # transformers would refuse .half(), .float() and training, which are all fine here
        )
        if not self.attention_asked and (reason := probe.adopt(model)):
            logger.warning(f"gaugekit: attention: {reason}; {model.config._attn_implementation!r} stays")
        lam = self.quantization_config.neutreno
        if lam is not None:
            self.quantization_config.neutreno = (
                None  # the step writes λ into the config, and unfuse takes it off again
            )
            if not self.quantization_config.modules and self.packing is None:
                del model.config.quantization_config
            step = AttentionStep(lam)
            if left := step.apply(model)["left"]:
                raise ValueError(
                    f"quantization_config: neutreno does not fit this model: {left[0]['reason']}"
                )
            remember(model, [step])
        return model


register_quantizer(NAME)(GaugekitQuantizer)


interface.register()
packed_files.register()
parallel.register()
sas.register()
