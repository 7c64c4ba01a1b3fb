"""ALBERT: BERT's projections under other names, in few layers that the model runs again and again."""

from __future__ import annotations

from gaugekit.models.encoders.bert import Bert


class Albert(Bert):
    """Encoders of model_type "albert": a layer for each of the inner layers of each group, at whatever depths it runs.

    What is true of a layer's weights is true at every depth, so one element of a group is free, not one a depth.
    """

    names = ("albert",)
    anchor = "encoder.albert_layer_groups.0.albert_layers.0.attention.dense.weight"
    once = False

    @property
    def layers(self) -> int:
        return self.config.get("num_hidden_groups", 1) * self._inner

    @property
    def unstreamed(self) -> str | None:
        return "it runs the same block at several depths"

    def block(self, layer: int) -> str:
        group, inner = divmod(layer, self._inner)
        return f"encoder.albert_layer_groups.{group}.albert_layers.{inner}"

    @property
    def _inner(self) -> int:
        return self.config.get("inner_group_num", 1)

    def _parts(self) -> dict[str, str]:
        return {"q": "query", "k": "key", "v": "value", "o": "dense"}
