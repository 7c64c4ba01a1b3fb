"""Modules: compact forms of projections, and their registry."""

from . import forms
from .concat import Concat
from .gauge_projection import GaugeProjection

__all__ = ["Concat", "GaugeProjection", "forms"]
