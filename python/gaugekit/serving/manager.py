"""transformers' manager of served models, which also takes what gaugekit knows how to load.

``transformers serve`` admits five names of attentions and looks a model's class up in its own namespace. So the manager
is exchanged for one derived from it, while the server is built and no longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import transformers
from transformers.cli.serving import model_manager

from gaugekit.hf.attention import interface, probe
from gaugekit.hf.quantizer import GaugekitConfig
from gaugekit.hf.sas import SASForCausalLM
from gaugekit.verbs.fuse import fuse

Manager = model_manager.ModelManager


@contextlib.contextmanager
def installed(attention: str | None, packed: bool, cache: str | None = None) -> Iterator[None]:
    """Within, ``transformers serve`` builds its server with our manager.

    ``attention`` "gaugekit" gives every model our attention or refuses it, None leaves the choice to the loader;
    ``packed`` keeps the matrices packed in memory, ``cache`` "x" or "v" fuses every model so, or refuses it.
    """
    if not hasattr(transformers, SASForCausalLM.__name__):
        setattr(transformers, SASForCausalLM.__name__, SASForCausalLM)
    model_manager.ModelManager = _kind(attention, packed, cache)
    try:
        yield
    finally:
        model_manager.ModelManager = Manager


def _kind(attention: str | None, packed: bool, cache: str | None) -> type[Manager]:
    class GaugekitManager(Manager):
        """One for each server, as its class is all that the server is told."""

        def _validate_args(self) -> None:
            try:
                super()._validate_args()
            except ValueError as error:
                raise ValueError(f"transformers serve: {error} gaugekit serve also takes gaugekit.") from None

        def get_quantization_config(self) -> Any:
            return GaugekitConfig(packed=True) if packed else super().get_quantization_config()

        def _load_model(self, *arguments: Any, **keywords: Any) -> transformers.PreTrainedModel:
            # In a thread that ends: the OpenMP threads of one that stays count as the process's, and where these are
            # more than its processors those of the thread that answers sleep after every product (3 ms otherwise).
            with ThreadPoolExecutor(1) as loader:
                model = loader.submit(super()._load_model, *arguments, **keywords).result()
            own = isinstance(model, SASForCausalLM) or model.config._attn_implementation == interface.NAME
            if attention == interface.NAME and not own and (reason := probe.adopt(model)):
                raise ValueError(
                    f"attn_implementation: gaugekit's does not cover this model: {reason}; leave it out, or choose sdpa"
                )
            if cache is not None and not (report := fuse(model, cache=cache))["cached"]:
                raise ValueError(
                    f"cache: no layer of this model can keep one tensor: {report['left'][0]['reason']}"
                )
            return model

        if not hasattr(
            Manager, "list_models"
        ):  # 5.23 lists the models of the Hub's cache, and fails without one

            @staticmethod
            def get_gen_models(cache_dir: str | None = None) -> list[dict]:
                return []

    return GaugekitManager
