"""A model on disk or live, and its compact forms."""

from gaugekit.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint"]
