"""What cannot be served is refused in one line, before a model is loaded; the verb hands its options over."""

import json
import shutil
import socket
import threading
import urllib.request

import pytest

transformers = pytest.importorskip("transformers")

from gaugekit import serving  # noqa: E402
from gaugekit.cli import main  # noqa: E402
from gaugekit.serving import launcher  # noqa: E402
from sliceable import build  # noqa: E402
from tiny import add_tokenizer, bert  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("llama").float().save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def refused(capsys, *arguments):
    assert main(["serve", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    line = err.rstrip("\n").rpartition("\n")[2]
    assert out == "" and line.startswith("gaugekit serve: "), err
    return line


def test_a_missing_extra_is_named(model, capsys, monkeypatch):
    import importlib.util

    own = importlib.util.find_spec
    monkeypatch.setattr(
        launcher.importlib.util, "find_spec", lambda name: None if name == "fastapi" else own(name)
    )
    assert refused(capsys, model).endswith("needs fastapi: pip install gaugekit[serving]")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """What is served although it should be refused ends at once."""

    def pause():
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher.signal, "pause", pause)


@pytest.fixture
def present():
    for package in launcher.PACKAGES:
        pytest.importorskip(package)


@pytest.mark.usefixtures("present")
class TestRefusals:
    def test_what_is_no_directory_of_a_model(self, capsys, tmp_path):
        assert "expected a model directory" in refused(capsys, tmp_path / "nothing")
        assert "config.json" in refused(capsys, tmp_path)

    def test_a_model_that_does_not_generate(self, capsys, tmp_path):
        bert().save_pretrained(tmp_path)
        assert "expected a model that generates text, got BertModel" in refused(capsys, tmp_path)

    def test_a_model_without_a_tokenizer(self, capsys, model, tmp_path):
        shutil.copytree(model, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
        assert "expected a tokenizer" in refused(capsys, tmp_path / "mute")

    def test_a_port_that_is_taken(self, capsys, model):
        with socket.create_server(("localhost", 0)) as taken:
            port = taken.getsockname()[1]
            assert f"--port: expected a free one on localhost, got {port}" in refused(
                capsys, model, "--port", port
            )

    @pytest.mark.parametrize("port", [-1, 70_000])
    def test_a_port_there_is_not(self, capsys, model, port):
        assert f"got {port}" in refused(capsys, model, "--port", port)

    def test_options_of_transformers_that_it_has_not(self, capsys, model):
        assert "--frobnicate" in refused(capsys, model, "--port", 0, "--", "--frobnicate")

    @pytest.mark.parametrize("option", ["--dtype", "--attn-implementation"])
    def test_names_that_transformers_does_not_know(self, capsys, model, option):
        assert "nothing" in refused(capsys, model, "--port", 0, option, "nothing")

    def test_our_attention_for_a_model_it_does_not_cover(self, capsys, tmp_path):
        sizes = dict(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
        config = transformers.Gemma2Config(
            **sizes, head_dim=8, intermediate_size=48, attn_logit_softcapping=2.0
        )
        transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
        add_tokenizer(tmp_path)
        line = refused(capsys, tmp_path, "--port", 0, "--attn-implementation", "gaugekit")
        assert "does not cover this model" in line and "softcap" in line

    def test_one_cached_tensor_beside_pages_or_for_a_model_that_has_none(self, capsys, model):
        line = refused(capsys, model, "--port", 0, "--cache", "x", "--continuous-batching")
        assert "--cache: expected without --continuous-batching" in line
        line = refused(capsys, model, "--port", 0, "--cache", "x", "--attn-implementation", "sdpa")
        assert "--cache: expected --attn-implementation gaugekit or none beside it, got sdpa" in line
        assert "turns its keys by position" in refused(capsys, model, "--port", 0, "--cache", "x")

    def test_what_is_packed_already_by_its_numbers(self, capsys, model):
        line = refused(capsys, model, "--port", 0, "--packed", "--dtype", "float32")
        assert "bfloat16" in line and "float32" in line


@pytest.mark.usefixtures("present")
def test_the_verb_serves_until_it_is_told_to_end(capsys, model, monkeypatch):
    """The signal that ends it is raised in place of waiting for it."""
    seen = {}

    def pause():
        line = next(line for line in capsys.readouterr().err.splitlines() if "/v1 answers" in line)
        address = line.split()[2]
        with urllib.request.urlopen(f"{address}/models", timeout=60) as response:
            seen["models"] = json.load(response)["data"]
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher.signal, "pause", pause)
    assert main(["serve", str(model), "--port", "0", "--json", "--", "--log-level", "error"]) == 0
    assert "models" in seen
    assert json.loads(capsys.readouterr().out)["model"] == str(model)


@pytest.mark.usefixtures("present")
def test_two_servers_of_one_process_keep_their_options(model):
    """The manager we put in transformers' place is there only while a server is built."""
    from transformers.cli.serving import model_manager

    own = model_manager.ModelManager
    with serving.running(model), serving.running(model, attn_implementation="gaugekit"):
        assert model_manager.ModelManager is own


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize("options", [{}, {"attn_implementation": "gaugekit"}])
def test_a_model_is_loaded_in_a_thread_that_ends(model, monkeypatch, options):
    """The threads of OpenMP that a thread has count as the process's until it ends: see ``serving.manager``."""
    from gaugekit.hf.attention import probe
    from gaugekit.serving import manager

    seen = []

    def noting(call):
        def noted(*arguments, **keywords):
            seen.append(threading.current_thread())
            return call(*arguments, **keywords)

        return noted

    monkeypatch.setattr(manager.Manager, "_load_model", noting(manager.Manager._load_model))
    monkeypatch.setattr(probe, "adopt", noting(probe.adopt))
    with serving.running(model, **options):
        loading = set(seen)
        assert len(seen) == 1 + len(options) and len(loading) == 1 and threading.main_thread() not in loading
        loading.pop().join(5)
        assert not seen[0].is_alive()


def test_what_goes_wrong_in_that_thread_is_told():
    from gaugekit.serving import manager

    with pytest.raises(KeyError, match="missing"):
        manager._in_a_thread_that_ends(lambda: {}["missing"])
