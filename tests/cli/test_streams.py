"""What becomes of a verb whose output cannot be printed: no traceback, a status that says so, files that are whole."""

import os
import subprocess

import pytest

import tiny_directory
from gaugekit.cli import calls, main
from warm import python

QUIET = {**os.environ, "PYTHONWARNINGS": "ignore::RuntimeWarning"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_directory.write(tmp_path_factory.mktemp("models") / "tiny-bert")


def shell(line, *arguments):
    """Runs a line of bash in which "$@" is ``python -m gaugekit arguments``."""
    command = [*python(), "-m", "gaugekit", *map(str, arguments)]
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", *command],
        capture_output=True,
        text=True,
        env=QUIET,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('"$@" >&-', "done, but standard output is closed"),
        ('"$@" >/dev/full', "done, but the result could not be printed: [Errno 28]"),
        ('"$@" >&- 2>&-', ""),
        ('"$@" 2>/dev/full | true', ""),
    ],
)
def test_work_that_was_done_exits_0(model, tmp_path, line, said):
    done = shell(line, "convert", model, tmp_path / "out", "--gauge", "--json")
    assert done.returncode == 0 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == bool(said)
    plain = tmp_path / "plain"
    assert main(["convert", str(model), str(plain), "--gauge"]) == 0
    for path in plain.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('"$@" >&-', "gaugekit doctor: standard output is closed"),
        ('"$@" >/dev/full', "gaugekit doctor: the result could not be printed: [Errno 28]"),
        ('"$@" >/dev/full 2>/dev/full', ""),
    ],
)
def test_a_result_that_was_not_printed_exits_2(line, said):
    done = shell(line, "doctor")
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == bool(said)


def test_an_error_goes_to_no_other_stream():
    done = shell('"$@" 2>&-', "inspect", "nowhere")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_help_that_was_not_printed_exits_2():
    assert shell('"$@" >/dev/full', "--help").returncode == 2


class Odd(Exception):
    """An error that no verb foresees."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Odd("one\ntwo"), "unexpected Odd: one two (GAUGEKIT_TRACEBACK=1 shows where)"),
        (KeyError("hidden"), "unexpected KeyError: 'hidden' ("),
        (MemoryError(), "the memory of this machine is not enough"),
        (RecursionError("deep"), "nested more deeply"),
        (Odd("x" * 5000), "…"),
    ],
)
def test_an_error_that_was_not_foreseen_is_one_line(monkeypatch, capsys, error, said):
    def fails(arguments):
        raise error

    monkeypatch.delenv("GAUGEKIT_TRACEBACK", raising=False)
    monkeypatch.setattr(calls, "doctor", fails)
    assert main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gaugekit doctor: ") and err.count("\n") == 1
    assert said in err and len(err) < 600
    monkeypatch.setenv("GAUGEKIT_TRACEBACK", "1")
    assert main(["doctor"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_write_that_fails_in_the_middle(model, tmp_path):
    """No file may pass 40 KB: one line, no output, and the same call finishes once there is room."""
    done = shell('ulimit -f 40; "$@"', "convert", model, tmp_path / "out", "--gauge")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(model), str(tmp_path / "out"), "--gauge"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
