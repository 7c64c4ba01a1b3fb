"""The command line."""

from gaugekit.cli.command import main

__all__ = ["main"]
