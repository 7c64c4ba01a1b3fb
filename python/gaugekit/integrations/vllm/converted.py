"""Converted, truncated and sliced models in vLLM: its transformers backend, with the forms put in place."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.transformers import TransformersForCausalLM

from gaugekit.checkpoint.install import install
from gaugekit.hf.sliced import Sliced
from gaugekit.hf.sliced import install as install_sliced
from gaugekit.integrations.vllm.quantization import Forms
from gaugekit.integrations.vllm.ranks import Ranks, cut_forms
from gaugekit.nn.parallel import even
from gaugekit.nn.sliced import RotatedEmbedding


class GaugekitForCausalLM(TransformersForCausalLM):
    """transformers' model with the forms of config.json, on vLLM's attention; not compiled.

    On several tensor-parallel ranks each has whole heads (``ranks.cut_forms``). Raises ValueError on several pipeline
    ranks, for a sliced model on several ranks of either kind, for key heads or forms that the ranks cannot share, and
    for weights that the directory lacks.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        forms = vllm_config.quant_config
        ranks = vllm_config.parallel_config
        if not isinstance(forms, Forms):
            raise ValueError(f"{type(self).__name__}: expected a directory that gaugekit converted or sliced")
        if ranks.pipeline_parallel_size != 1:
            raise ValueError(
                "pipeline_parallel_size: expected 1 for a model that gaugekit converted or sliced, got "
                f"{ranks.pipeline_parallel_size}; a directory converted with --dense can be cut"
            )
        if ranks.tensor_parallel_size != 1 and forms.sliced is not None:
            raise ValueError(
                "tensor_parallel_size: expected 1 for a model whose stream is sliced, since bases cannot be cut, got "
                f"{ranks.tensor_parallel_size}"
            )
        self.sliced = None if forms.sliced is None else Sliced.read(forms.sliced)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.sliced is not None and self.sliced.head:
            self._slice_head(vllm_config)

    def _decorate_for_torch_compile(self) -> None:
        """Not compiled: a sliced norm hands x to the layer that ends its junction, past the graph."""

    def _create_hf_to_vllm_mapper(self) -> None:
        """Puts the forms in place first: after transformers made the model, before vLLM looks at its layers."""
        forms = self.quant_config
        with torch.device("meta"):
            install(self.model, forms.modules, self.model_config.dtype)
            if self.sliced is not None:
                install_sliced(self.model, self.sliced, self.model_config.dtype)
        if self.tp_group.world_size > 1:
            ranks = Ranks(self.tp_group.world_size, self.tp_group.rank_in_group)
            even("num_key_value_heads", self.model_config.get_total_num_kv_heads(), ranks)
            cut_forms(self.model, ranks, self.device_config.device)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    module.register_buffer(name, torch.zeros_like(buffer, device=self.device_config.device))
        self.stored = _stored(self.model)
        _mark(self.model)
        forms.installed = True
        super()._create_hf_to_vllm_mapper()

    def recursive_replace(self) -> None:
        """vLLM's, but that the layers it puts in the place of others keep their hooks."""
        hooks = {
            name: list(module._forward_hooks.values())
            for name, module in self.model.named_modules()
            if module._forward_hooks
        }
        super().recursive_replace()
        for name, kept in hooks.items():
            module = self.model.get_submodule(name)
            for hook in [] if module._forward_hooks else kept:
                module.register_forward_hook(hook)

    def _slice_head(self, vllm_config: Any) -> None:
        """The head of a model whose last basis is sliced as well."""
        vocabulary, size = self.text_config.vocab_size, self.text_config.hidden_size
        make = {"dtype": self.model_config.dtype, "device": self.device_config.device}
        if self._get_tie_word_embeddings():
            self.lm_head.rotation = nn.Parameter(torch.empty(self.sliced.width, size, **make))
        else:
            self.lm_head = ParallelLMHead(vocabulary, self.sliced.width, params_dtype=make["dtype"]).to(
                make["device"]
            )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        rotation = getattr(self.lm_head, "rotation", None)
        return super().compute_logits(hidden_states if rotation is None else hidden_states @ rotation)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's, and every parameter and row of a form has to come: ValueError for what is missing.

        By the names in the files: of a matrix that vLLM makes of several, it says only that some of it came.
        """
        came: set[str] = set()
        loaded = super().load_weights(self._noted(weights, came))
        absent = self.stored - {name.removeprefix(f"{self.model.base_model_prefix}.") for name in came}
        absent |= {f"lm_head.{name}" for name, _ in self.lm_head.named_parameters()} - loaded
        if self._get_tie_word_embeddings():
            absent.discard("lm_head.weight")
        if absent:
            raise ValueError(f"{len(absent)} weights are missing: {', '.join(sorted(absent)[:4])}")
        return loaded

    def _noted(self, weights: Iterable[tuple[str, Tensor]], came: set[str]) -> Iterable[tuple[str, Tensor]]:
        """``weights``, their names entered in ``came``; a table that a sliced model shares with its head comes twice,
        since vLLM's head has its own.
        """
        embedding = self.model.get_input_embeddings()
        shared = isinstance(embedding, RotatedEmbedding) and self._get_tie_word_embeddings()
        table = next(name for name, module in self.model.named_modules() if module is embedding) + ".weight"
        for name, tensor in weights:
            came.add(name)
            yield name, tensor
            if shared and name.endswith(table):
                yield "lm_head.weight", tensor


def _stored(model: nn.Module) -> set[str]:
    """The names of what a directory has to hold for ``model``: parameters, and the buffers of forms."""
    forms = [(path, module) for path, module in model.named_modules() if getattr(module, "form", None)]
    rows = {f"{path}.{name}" for path, module in forms for name in module.state_dict() if "." not in name}
    return {name for name, _ in model.named_parameters()} | rows


def _mark(model: nn.Module) -> None:
    """Gives a module that holds parts of ours a child that does nothing, named after what its children are.

    vLLM remembers by the class of a module and the names of its children which of them it may fuse: a plain MLP seen
    before would decide over one whose last layer is ours.
    """
    for module in list(model.modules()):
        children = [(name, type(child)) for name, child in module.named_children()]
        if any(kind.__module__.startswith("gaugekit.") for _, kind in children):
            layout = repr([(name, kind.__qualname__) for name, kind in children])
            module.add_module(f"gaugekit_{zlib.crc32(layout.encode()):08x}", nn.Identity())
