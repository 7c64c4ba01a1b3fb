"""Law 8: a figure names what it was measured on and against what; a wrong result has no figure."""

import json
import subprocess
from pathlib import Path

import pytest

from warm import python

BENCH = Path(__file__).resolve().parents[2] / "bench"
MODULES = ("registry.py", "run.py", "backends.py", "host_rows.py", "device_rows.py")
FIELDS = {
    "op",
    "shape",
    "dtype",
    "device",
    "machine",
    "commit",
    "baseline",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "ratio",
    "share_of_peak",
    "peak_bytes",
    "without_us",
}


def run(folder, *arguments):
    return subprocess.run(
        [*python(), str(folder / "run.py"), "--quick", "--json", *arguments],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def bench(tmp_path):
    """The runner with benchmarks of its own: one right, one wrong, and a rival that is not installed."""
    for name in MODULES:
        (tmp_path / name).write_text((BENCH / name).read_text())
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "bench_probe.py").write_text(
        "import torch\n"
        "from registry import Case, benchmark\n"
        "def wrong(): raise AssertionError('off by one')\n"
        "@benchmark('probe')\n"
        "def cases(device, quick):\n"
        "    a = torch.ones(64, 64)\n"
        "    rivals = {'twice': lambda: (a @ a, a @ a), 'missing': None}\n"
        "    common = dict(op='probe', dtype='float32', device=device, ours=lambda: a @ a, rivals=rivals,\n"
        "                  without_us='twice', flops=2 * 64**3)\n"
        "    yield Case(shape='right', check=lambda: None, **common)\n"
        "    yield Case(shape='wrong', check=wrong, **common)\n"
    )
    return tmp_path


def test_rows_are_complete_and_wrong_results_have_none(bench):
    done = run(bench)
    rows = json.loads(done.stdout)
    assert done.returncode == 1 and "off by one" in done.stderr
    assert {row["shape"] for row in rows} == {"right"}
    assert all(row.keys() >= FIELDS for row in rows)
    present, absent = rows
    assert present["ratio"] > 1 and present["without_us"] == present["ratio"]
    assert absent["absent"] and absent["ratio"] is None


def test_rounds_disturbed_on_either_number_of_threads_do_not_count(bench):
    """On a clock of its own, which only the calls move on: ours takes 2 ms, on one thread 8 ms or, disturbed, 24, on
    two 4.2 ms or 16. One and two threads are undisturbed together in 3/5 · 1/3 = 1/5 of the rounds.
    """
    (bench / "ops" / "bench_probe.py").write_text(
        "import host_rows, itertools, time\n"
        "from registry import Case, benchmark\n"
        "now = [0.0]\n"
        "def wait(ms): now[0] += ms / 1000\n"
        "def tick():\n"
        "    wait(1e-4)\n"
        "    return now[0]\n"
        "time.perf_counter = tick\n"
        "host_rows.of_others = lambda: (now[0], 0.0, 0.0)\n"
        "ones, twos = itertools.cycle([8, 8, 8, 24, 24]), itertools.cycle([4.2, 16, 16])\n"
        "@benchmark('probe')\n"
        "def cases(device, quick):\n"
        "    yield Case(op='probe', shape='', dtype='float32', device=device, ours=lambda: wait(2),\n"
        "               rivals={'one': lambda: wait(next(ones)), 'two': lambda: wait(next(twos))}, without_us='one',\n"
        "               check=lambda: None, control=('one', 'two'))\n"
    )
    one, two = json.loads(run(bench).stdout)
    assert one["median_ms"] == pytest.approx(2, rel=1e-3)
    assert one["baseline_ms"] == pytest.approx(8, rel=1e-3) and one["ratio"] == pytest.approx(4, rel=1e-3)
    assert two["baseline_ms"] == pytest.approx(4.2, rel=1e-3) and two["ratio"] == pytest.approx(2.1, rel=1e-3)
    assert two["ratio_all_rounds"] == pytest.approx(8, rel=1e-3)  # in two rounds of three it waited for 16 ms
    assert one["rounds"] >= 5
    assert (
        4 * one["rounds"] - 15 <= one["rounds_disturbed"] <= 4 * one["rounds"] + 15
    )  # whole periods, or nearly


def test_unknown_operator_is_one_line(bench):
    done = run(bench, "--op", "nothing")
    assert done.returncode == 2 and "op must be one of probe; got nothing" in done.stderr


def test_each_case_is_a_line_on_disk_and_an_error_stops_none_that_follow(bench, tmp_path):
    """The case that raises comes first, and its error is no AssertionError."""
    probe = (bench / "ops" / "bench_probe.py").read_text()
    raising = "def broken(): raise RuntimeError('no room\\nsecond line')\n@benchmark('probe')\n"
    probe = probe.replace("@benchmark('probe')\n", raising)
    first = "    yield Case(shape='broken', check=broken, **common)\n    yield Case(shape='right'"
    (bench / "ops" / "bench_probe.py").write_text(probe.replace("    yield Case(shape='right'", first))
    path = tmp_path / "rows.jsonl"
    done = run(bench, "--rows", str(path), "--commit", "0123abc", "--budget", "0.05")
    assert done.returncode == 1
    broken, right, wrong = (json.loads(line) for line in path.read_text().splitlines())
    assert (broken["op"], broken["case"]) == ("probe", "broken float32")
    assert broken["error"] == "RuntimeError: no room" and broken["commit"] == "0123abc"
    assert wrong["error"] == "AssertionError: off by one" and "rows" not in wrong
    assert right["rows"] == json.loads(done.stdout) and {row["commit"] for row in right["rows"]} == {
        "0123abc"
    }
    run(bench, "--rows", str(path), "--case", "right", "--budget", "0.05")
    assert len(path.read_text().splitlines()) == 4  # appended, and only the case that was asked for


def test_list_names_cases_and_measures_none(bench):
    cases = json.loads(run(bench, "--list").stdout)
    assert cases == [{"op": "probe", "case": f"{name} float32"} for name in ("right", "wrong")]


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*.json")), ids=lambda p: p.stem)
def test_committed_results_name_machine_commit_and_date(path):
    record = json.loads(path.read_text())
    assert {"machine", "commit", "date", "rows"} <= record.keys() and record["rows"]
    untimed = {"op", "shape", "dtype", "label", "machine", "commit"}
    # Nothing timed in turns with a rival: servers under load run one after the other.
    if record["piece"].startswith(("slicing", "gauge_noise", "gauge_quantize", "gauge_training", "serving")):
        assert all(row.keys() >= untimed for row in record["rows"])
    elif record["piece"] != "tests":
        sizes = [row for row in record["rows"] if row.get("label") == "bytes"]
        timed = [row for row in record["rows"] if row.get("label") != "bytes"]
        assert all(row.keys() >= untimed for row in sizes)
        assert timed and all(row.keys() >= FIELDS for row in timed)
