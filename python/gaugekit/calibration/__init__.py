"""What flows through a model: second moments of a live one, or of a checkpoint with one layer in memory."""

from gaugekit.calibration.moments import Moments, observe
from gaugekit.calibration.streaming import collect

__all__ = ["Moments", "collect", "observe"]
