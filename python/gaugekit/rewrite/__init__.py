"""Rewrites of a checkpoint, and the engine that streams it through them: ``convert``."""

from ..checkpoint import Checkpoint
from .engine import convert
from .job import VERSION
from .rewrite import Later, Rewrite, invariance_error

__all__ = ["VERSION", "Checkpoint", "Later", "Rewrite", "convert", "invariance_error"]
