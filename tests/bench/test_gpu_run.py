"""A run on a GPU keeps to its time, records what fails and passes by it, whatever its pieces do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402
import gpu_ledger as ledger  # noqa: E402
import gpu_pieces  # noqa: E402
from gpu_profile import parsed  # noqa: E402
from gpu_rehearsal import HANGS, FakeMachine, Fate, faults, rehearse  # noqa: E402
from gpu_runner import Piece, RealMachine, Runner  # noqa: E402
from gpu_tests import of_smoke  # noqa: E402


def ends(out):
    return {line["piece"]: line for line in ledger.lines_of(out / ledger.PIECES)[0] if line["event"] == "end"}


def test_the_rehearsal_of_the_whole_schedule_finds_nothing_wrong():
    wrong, longest = faults()
    assert not wrong
    assert longest <= gpu_pieces.SECONDS


def test_limits_add_up_to_the_time_of_a_run(tmp_path):
    """Stages follow each other and take the longest of their pieces: hand sum of the table, under eight minutes."""
    stages = {}
    for piece in gpu_pieces.pieces(tmp_path):
        stages.setdefault(piece.stage, []).append(piece.limit)
    assert sum(map(max, stages.values())) <= gpu_pieces.SECONDS == 480


def test_every_operator_is_timed_and_every_piece_described(tmp_path):
    pieces = gpu_pieces.pieces(tmp_path)
    timed = {piece.command[piece.command.index("--op") + 1] for piece in pieces if "--op" in piece.command}
    assert timed == {path.stem.removeprefix("gpu_") for path in (BENCH / "ops").glob("gpu_*.py")}
    table = (BENCH.parent / "docs" / "gpu.md").read_text()
    assert not [piece.name for piece in pieces if f"`{piece.name}`" not in table]


def test_a_piece_that_hangs_costs_its_limit_and_no_more(tmp_path):
    machine, end = rehearse({"smoke": Fate(HANGS)}, tmp_path)
    others = len(gpu_pieces.pieces(tmp_path)) - 2  # `once` runs beside the tests
    assert machine.now() == pytest.approx(35 + others, abs=0.2 * (others + 1))
    assert end["smoke"]["status"] == "timeout" and end["smoke"]["seconds"] == pytest.approx(35, abs=0.2)
    assert end["smoke"]["output"] == "the last line"
    assert end["profile"]["status"] == "ok"


def test_what_has_no_time_left_is_skipped_and_said(tmp_path):
    pieces = [Piece(name, name, 50, ("true",)) for name in ("first", "second", "third")]
    machine = FakeMachine(dict.fromkeys(("first", "second"), Fate(HANGS)))
    assert not Runner(machine, tmp_path, 80).run(pieces)
    end = ends(tmp_path)
    assert [end[name]["status"] for name in ("first", "second", "third")] == ["timeout", "timeout", "skipped"]
    assert end["second"]["seconds"] == pytest.approx(30, abs=0.2) and "no time" in end["third"]["reason"]
    assert machine.now() == pytest.approx(80, abs=0.2)


def program(tmp_path, name, text, limit=20.0, stage=None):
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    return Piece(name, stage or name, limit, (sys.executable, str(path)))


def test_real_processes_end_with_their_children_and_leave_their_output(tmp_path):
    child = (
        "import subprocess\n"
        "sleeper = subprocess.Popen(['sleep', '600'])\n"
        "print('child', sleeper.pid, flush=True)\n"
        "sleeper.wait()\n"
    )
    pieces = [
        program(tmp_path, "hangs", child, limit=4.5, stage="together"),
        program(tmp_path, "raises", "raise ValueError('no such tile')", stage="together"),
        program(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)", stage="together"),
        Piece("absent", "absent", 20, (str(tmp_path / "nothing"),)),
        program(tmp_path, "well", "print('done')"),
    ]
    out = tmp_path / "out"
    out.mkdir()
    assert not Runner(RealMachine(out, dict(os.environ)), out, 60).run(pieces)
    end = ends(out)
    assert {name: line["status"] for name, line in end.items()} == {
        "hangs": "timeout", "raises": "failed", "killed": "failed", "absent": "failed", "well": "ok"}  # fmt: skip
    assert "no such tile" in end["raises"]["output"] and "signal 9" in end["killed"]["reason"]
    assert "did not start" in end["absent"]["reason"]
    log = (out / ledger.LOG).read_text()
    assert "[well] done" in log and "[raises] ValueError: no such tile" in log
    orphan = int(log.split("child ", 1)[1].split()[0])
    for _ in range(50):
        if not Path(f"/proc/{orphan}").exists() or " Z " in Path(f"/proc/{orphan}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the child of a piece that was stopped still runs")


def test_a_run_that_is_terminated_kills_its_piece_and_writes_the_table(tmp_path):
    run = (
        f"import os, sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "from pathlib import Path\n"
        "from gpu_runner import *\n"
        "out = Path(sys.argv[1])\n"
        "pieces = [Piece(n, n, 60, ('sleep', '60')) for n in ('now', 'later')]\n"
        "print(Runner(RealMachine(out, dict(os.environ)), out, 100).run(pieces))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", run, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(200):
        if (tmp_path / ledger.PIECES).exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0].strip() == "False"
    end = ends(tmp_path)
    assert (end["now"]["status"], end["later"]["status"]) == ("stopped", "skipped")
    assert "stopped" in (tmp_path / ledger.TABLE).read_text()


def test_torn_lines_are_counted_and_do_not_hide_the_others(tmp_path):
    path = tmp_path / ledger.ROWS
    row = {"baseline": "copy", "median_ms": 2.0, "baseline_ms": 3.0, "ratio": 1.5, "share_of_peak": 0.25}
    ledger.append(path, {"op": "rans", "case": "64 MiB", "rows": [row]})
    ledger.append(path, {"op": "rans", "case": "too large", "error": "OutOfMemoryError: no"})
    with path.open("a") as file:
        file.write('{"op": "rans", "ca')
    text = ledger.table(tmp_path)
    assert "rans  64 MiB  copy      2          3            1.5    0.25" in text
    assert "not timed: rans too large: OutOfMemoryError: no" in text and "1 torn lines" in text


def test_a_second_try_replaces_the_first_in_the_table(tmp_path):
    for median in (5.0, 2.0):
        row = {"baseline": "copy", "median_ms": median}
        ledger.append(tmp_path / ledger.ROWS, {"op": "rans", "case": "64 MiB", "rows": [row]})
    ledger.append(tmp_path / ledger.TESTS, {"test": "a", "outcome": "failed", "reason": "off by one"})
    ledger.append(tmp_path / ledger.TESTS, {"test": "b", "outcome": "failed", "reason": "no kernel"})
    ledger.append(tmp_path / ledger.TESTS, {"test": "a", "outcome": "passed"})
    text = ledger.table(tmp_path)
    assert text.count("64 MiB") == 1 and "5" not in text.split("64 MiB")[1].split("\n")[0]
    assert "1 failed, 1 passed" in text and "b: no kernel" in text and "off by one" not in text


def test_at_most_eight_files_come_back(tmp_path):
    """Every file that a piece's command or environment names, and those of the run itself."""
    names = {ledger.PIECES, ledger.LOG, ledger.TABLE}
    for piece in gpu_pieces.pieces(tmp_path):
        for word in (*piece.command, *piece.environment.values()):
            if str(tmp_path) in word:
                names.add(Path(word.split("=")[-1]).name)
    assert names >= {ledger.ROWS, ledger.TESTS, ledger.MEASURES, "smoke.xml", "tests.xml"}
    assert len(names) <= 8


def test_the_first_look_takes_one_test_a_function_and_width():
    names = [
        ("tests/a.py", "test_x[float32-1]"), ("tests/a.py", "test_x[float32-2]"), ("tests/a.py", "test_x[bfloat16-1]"),
        ("tests/a.py", "test_y"), ("tests/b.py", "test_y"), ("tests/codec/test_device.py", "test_z[1]"),
        ("tests/codec/test_device.py", "test_z[2]"),
    ]  # fmt: skip
    assert of_smoke(names) == [True, False, True, True, True, True, True]


def test_every_test_ends_as_one_line(tmp_path):
    (tmp_path / "test_probe.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no disk')\n"
        "def test_well(): pass\n"
        "def test_wrong(): assert 1 == 2, 'off by one'\n"
        "def test_set_up(broken): pass\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_skipped(): pass\n"
    )
    (tmp_path / "test_unreadable.py").write_text("import nothing_of_this_name\n")
    lines = tmp_path / "tests.jsonl"
    environment = os.environ | {"PYTHONPATH": str(BENCH), "GAUGEKIT_TEST_LINES": str(lines)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_tests", "-p", "no:cacheprovider", "-n", "2"]
    command += ["--continue-on-collection-errors", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    found = {}
    for text in lines.read_text().splitlines():
        line = json.loads(text)
        found[line["test"].split("::")[-1]] = (line["outcome"], line.get("reason", ""))
    assert found["test_well"] == ("passed", ""), done.stdout
    assert found["test_wrong"][0] == "failed" and "off by one" in found["test_wrong"][1]
    assert found["test_set_up"][0] == "error" and "no disk" in found["test_set_up"][1]
    assert found["test_skipped"][0] == "skipped"
    assert (
        found["test_unreadable.py"][0] == "error" and "nothing_of_this_name" in found["test_unreadable.py"][1]
    )


def test_the_profiler_s_table_is_read():
    text = (
        "==PROF== Connected to process 7\n"
        '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","7","rans_decode_rows(Row const *)","Launch Statistics","Registers Per Thread","register/thread","40"\n'
        '"0","7","rans_decode_rows(Row const *)","GPU Speed Of Light","DRAM Throughput","%","61.5"\n'
    )
    metrics = {"Registers Per Thread": "40 register/thread", "DRAM Throughput": "61.5 %"}
    assert parsed(text) == {"rans_decode_rows #0": metrics}
    assert parsed("==ERROR== no permission\n") == {}


def test_rows_that_came_back_become_results_a_second_try_replacing_the_first(tmp_path):
    """What is kept is what tests/laws/test_speed_rows.py asks of a committed result."""
    common = {
        "op": "rans",
        "shape": "decode",
        "dtype": "bfloat16",
        "label": "",
        "machine": "NVIDIA H100 80GB HBM3",
    }
    for median in (5.0, 2.0):
        row = common | {"baseline": "copy", "median_ms": median, "commit": "abc"}
        ledger.append(tmp_path / ledger.ROWS, {"op": "rans", "case": "decode", "rows": [row]})
    ledger.append(tmp_path / ledger.ROWS, {"op": "rans", "case": "encode", "error": "OutOfMemoryError: no"})
    about = {"commit": "abc", "date": "2026-12-01", "torch": "2.11.0+cu130"}
    ledger.append(tmp_path / ledger.MEASURES, about)
    (path,) = gpu.keep(tmp_path, tmp_path)
    assert path.name == "rans-nvidia-h100-80gb-hbm3-2026-12-01.json"
    record = json.loads(path.read_text())
    assert [row["median_ms"] for row in record["rows"]] == [2.0]
    assert {name: record[name] for name in about} == about and record["machine"] == common["machine"]


def test_an_unknown_piece_is_one_line():
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--piece", "rans nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "expected names among ceilings, smoke" in done.stderr
    assert done.stderr.rstrip().endswith("got nothing")


def test_only_files_with_tests_for_a_gpu_are_collected():
    files = gpu_pieces.gpu_test_files()
    assert {"tests/codec/test_device.py", "tests/nn/test_on_gpu.py"} <= set(files)
    assert not [name for name in files if "integrations" in name or name.endswith("test_verify.py")]
