"""The engine that streams a checkpoint through rewrites."""

from .checkpoint import Checkpoint

__all__ = ["Checkpoint"]
