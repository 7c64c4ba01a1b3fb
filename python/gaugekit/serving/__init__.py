"""Serves models: transformers' own server, with gaugekit's parts registered in it."""

from gaugekit.serving.launcher import running, serve

__all__ = ["running", "serve"]
