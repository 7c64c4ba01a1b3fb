"""Rewrites of a checkpoint, and the engine that streams it through them."""

from gaugekit.rewrite.rewrite import Calibration, Later, Rewrite, Step, invariance_error

__all__ = ["Calibration", "Later", "Rewrite", "Step", "invariance_error"]
