"""What a written checkpoint says of the programs that made it."""

import importlib.metadata

import gaugekit as gk
from gaugekit import doctor
from gaugekit.checkpoint.writer import versions


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    """The machine with the GPU imports gaugekit as it stands: no record of an installation is there to ask."""
    ask = importlib.metadata.version

    def absent(name: str) -> str:
        if name == "gaugekit":
            raise importlib.metadata.PackageNotFoundError(name)
        return ask(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert versions()["gaugekit"] == gk.__version__
    assert gk.__version__ in str(doctor.report())
