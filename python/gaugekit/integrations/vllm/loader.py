"""``--load-format gaugekit``: packed directories into vLLM's own model classes, tensor by tensor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader


class PackedLoader(DefaultModelLoader):
    """vLLM's default loader, but for where its tensors come from.

    A model gets whole tensors and cuts out what its rank keeps, as from any other file; memory: the model and the
    tensor that is being decoded. Damage raises a ValueError that names the file, before a model that lacks something
    could answer.
    """

    def download_model(self, model_config: Any) -> None:
        """ValueError where the model is not a directory here: nothing is downloaded."""
        if not Path(model_config.model).is_dir():
            raise ValueError(
                f"load_format gaugekit: expected a local directory, got {model_config.model!r}; download it first"
            )

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model's directory; ValueError for a model that reads from other places as well."""
        from gaugekit.integrations.vllm.weights import weights

        self.download_model(model_config)
        if places := getattr(model, "secondary_weights", ()):
            raise ValueError(
                f"load_format gaugekit: expected a model in one directory, got {type(model).__name__}, which also "
                f"reads {', '.join(str(place.model_or_path) for place in places)}"
            )
        self.counter_before_loading_weights = time.perf_counter()
        return weights(model_config.model)
