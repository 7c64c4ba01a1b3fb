"""doctor: what it says about backends, operators and extras, on this machine and on poorer ones."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from gaugekit import _library, doctor
from gaugekit.cli import main
from warm import python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it


def test_versions_and_machine():
    found = doctor.report()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"]["cores"] >= 1 and found["cpu"]["threads"] == torch.get_num_threads()
    assert (found["cuda_device"] is None) == (not torch.cuda.is_available())


def test_json_is_one_object_and_text_says_the_same(capsys):
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    fields = json.loads(out)
    assert err == "" and set(fields["backends"]) == {"cpu", "cuda", "triton", "codec"}
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name, row in fields["operators"].items():
        assert name in text and set(row) == {"cpu", "cuda"} and set(row.values()) <= {"binary", "composition"}


def test_operators_are_those_the_binaries_register():
    operators = doctor.report()["operators"]
    assert "shaped_combine" in operators
    for name, row in operators.items():
        assert (row["cpu"] == "binary") == _library.implementation(name, "CPU")


def test_a_missing_binary_comes_with_why_and_remedy(monkeypatch):
    missing = _library.Backend("cpu", False, "no C++ compiler was on PATH", "install g++")
    monkeypatch.setattr(_library, "backends", lambda: {"cpu": missing})
    found = doctor.report()
    assert found["backends"]["cpu"] == {
        "loaded": False,
        "why": "no C++ compiler was on PATH",
        "remedy": "install g++",
    }
    assert "cpu: no C++ compiler was on PATH. To mend it: install g++" in str(found)


@pytest.mark.parametrize("extra", doctor.EXTRAS)
def test_a_missing_extra_comes_with_its_pip_command(monkeypatch, extra):
    gone = doctor.EXTRAS[extra][-1]
    version = importlib.metadata.version

    def without(package):
        if package == gone:
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)
    found = doctor.report()
    assert found["extras"][extra]["packages"][gone] is None
    assert found["extras"][extra]["remedy"] == f"pip install gaugekit[{extra}]"
    assert f"pip install gaugekit[{extra}]" in str(found)


def test_extras_name_what_pyproject_asks_for():
    """Every package of an extra is one that pyproject.toml lists for it, and none is forgotten; what gaugekit itself
    needs (numpy, capped for triton) is no part of an extra.
    """
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    core = {Requirement(line).name for line in project["dependencies"]}

    def packages(extra):
        asked = [Requirement(line) for line in project["optional-dependencies"][extra]]
        own = {one.name for one in asked if one.name != "gaugekit"} - core
        return own.union(
            *(packages(other) for one in asked if one.name == "gaugekit" for other in one.extras)
        )

    assert len(packages("demo")) > len(packages("hf")) >= 3
    for extra, named in doctor.EXTRAS.items():
        assert set(named) == packages(extra), extra


def test_python_m_gaugekit_runs_the_command_line():
    done = subprocess.run(
        [*python(), "-W", "ignore", "-m", "gaugekit", "doctor"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("doctor\n")
