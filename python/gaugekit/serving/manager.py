"""transformers' manager of served models, which also takes what gaugekit knows how to load.

``transformers serve`` admits five names of attentions and looks a model's class up in its own namespace. So the manager
is exchanged for one derived from it, while the server is built and no longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from threading import Thread
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


def _in_a_thread_that_ends(call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises, from a thread of its own.

    OpenMP's idle threads stay awake for some 3 ms to wait for more work, but only while the process has no more of them
    than processors, and those of a thread count until it ends. Left behind by the one that loads, they would have the
    thread that answers wake its helpers for every product.
    """
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()  # daemon: Ctrl-C does not wait for it
    return future.result()


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
            return _in_a_thread_that_ends(lambda: self._loaded(*arguments, **keywords))

        def _loaded(self, *arguments: Any, **keywords: Any) -> transformers.PreTrainedModel:
            model = super()._load_model(*arguments, **keywords)
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
