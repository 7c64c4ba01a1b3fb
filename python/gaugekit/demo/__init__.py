"""The whole path on a real pretrained model, and the page that shows it."""

from gaugekit.demo.steps import holds, prepare, run, text

__all__ = ["holds", "prepare", "run", "text"]
