"""gaugekit removes from a transformer what nobody can observe."""

from . import _library

__version__ = "0.1.0"

_library.load()
