"""What vLLM takes from gaugekit: packed directories, converted and sliced models, SAS models (docs/serving.md).

vLLM calls ``register`` in each of its processes, by the entry point ``gaugekit`` of the group ``vllm.general_plugins``.
"""

from gaugekit.integrations.vllm.plugin import register

__all__ = ["register"]
