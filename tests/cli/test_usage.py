"""Exit statuses, and what stands on stderr and stdout, for good and bad command lines."""

import os
import shlex
import subprocess
import sys

import pytest

from gaugekit.cli import main
from warm import python

# without a binary `import gaugekit` warns once, whatever the verb; these tests count the verb's own lines
QUIET = {**os.environ, "PYTHONWARNINGS": "ignore::RuntimeWarning"}


def gaugekit(*arguments, **options):
    command = [*python(), "-m", "gaugekit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=QUIET, timeout=120, **options)


def refused(capsys, *arguments):
    """Runs a command line that must be refused, and returns its one line."""
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n"), err
    return err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "VERB"),
        (["melt"], "'melt'"),
        (["inspect"], "MODEL"),
        (["convert", "a"], "OUT"),
        (["convert", "a", "b"], "--gauge"),
        (["convert", "a", "b", "--gauge", "--rows", "first"], "max_volume"),
        (["convert", "a", "b", "--gauge", "--dtype", "int3"], "bfloat16"),
        (["verify", "a", "b", "--pool", "max"], "mean"),
        (["pack", "a"], "OUT"),
        (["doctor", "--frobnicate"], "--frobnicate"),
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_that_says_expected_and_given(capsys, arguments, expected):
    line = refused(capsys, *arguments)
    assert "expected" in line and expected in line
    assert line.rstrip().endswith("; got: " + " ".join(["gaugekit", *arguments]))


@pytest.mark.parametrize("verb", ["inspect", "verify", "convert", "pack", "unpack"])
def test_a_missing_input_is_one_line_that_names_it(capsys, tmp_path, verb):
    missing = tmp_path / "nothing here"
    rest = {"inspect": [], "verify": [tmp_path], "convert": [tmp_path / "out", "--gauge"]}
    line = refused(capsys, verb, missing, *rest.get(verb, [tmp_path / "out"]), "--json")
    assert line.startswith(f"gaugekit {verb}: ") and str(missing) in line


def test_a_directory_without_config_is_refused(capsys, tmp_path):
    assert "config.json" in refused(capsys, "inspect", tmp_path)


def test_an_unknown_family_names_the_known_ones(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "model.safetensors").write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}")
    line = refused(capsys, "convert", tmp_path, tmp_path.parent / "out", "--gauge")
    assert "mamba" in line and "bert" in line and "gpt2" in line


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_a_file_that_is_no_safetensors_is_refused(capsys, tmp_path, verb):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * 100)
    assert "not a .safetensors file" in refused(capsys, verb, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}")
    assert "pip install gaugekit[hf]" in refused(capsys, "verify", tmp_path, tmp_path)


def test_bench_without_a_source_checkout_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "gaugekit.cli.command.__file__", str(tmp_path / "python" / "gaugekit" / "cli" / "command.py")
    )
    assert "source checkout" in refused(capsys, "bench")


def test_bench_names_the_operators_it_knows(capsys):
    assert "nothing" in refused(capsys, "bench", "--op", "nothing")


def test_help_needs_nothing_heavy():
    heavy = "{'transformers', 'safetensors', 'triton', 'rich', 'zstandard'}"
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from gaugekit.cli import main\n"
        "assert main(['doctor', '--json']) == 0\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        f"late = {heavy} & (set(sys.modules) - before)\n"
        "assert not late, late\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=QUIET)
    assert done.returncode == 0, done.stderr


def test_the_process_exits_2_without_a_traceback(tmp_path):
    done = gaugekit("inspect", tmp_path / "none", "--json")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    command = f"{shlex.join(python())} -m gaugekit doctor --json | true"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=QUIET
    )
    assert done.returncode == 0 and done.stderr == ""


def test_interrupt_exits_130():
    """A real SIGINT while a verb is at work."""
    code = (
        "import signal, sys, gaugekit.doctor, gaugekit.cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background has it ignored
        "gaugekit.doctor.report = lambda: signal.raise_signal(signal.SIGINT)\n"
        "sys.exit(gaugekit.cli.main(['doctor']))\n"
    )
    done = subprocess.run([*python(), "-c", code], capture_output=True, text=True, env=QUIET)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gaugekit: interrupted\n")
