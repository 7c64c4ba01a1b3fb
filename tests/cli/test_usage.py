"""Exit statuses, and what stands on stderr and stdout, for good and bad command lines."""

import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import gaugekit as gk
from gaugekit.cli import calls, main
from warm import python

# without a binary `import gaugekit` warns once, whatever the verb; these tests count the verb's own lines
VERBS = ("inspect", "convert", "heal", "verify", "pack", "unpack", "serve", "bench", "doctor", "demo")
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
        (["melt"], "'melt'"),
        (["inspect"], "MODEL, got none"),
        (["convert", "a"], "OUT, got none"),
        (["convert", "a", "b"], "--gauge"),
        (["convert", "a", "b", "--gauge", "--rows", "first"], "balanced"),
        (["convert", "a", "b", "--gauge", "--dtype", "int3"], "bfloat16"),
        (["convert", "a", "b", "--rank", "x"], "int, got 'x'"),
        (["convert", "a", "b", "--rank", "3", "--energy", "0.5"], "got both"),
        (["convert", "a", "b", "--rank", "3", "--rows", "max_volume"], "beside --gauge"),
        (["convert", "a", "b", "--gauge", "--calibration", "c"], "--calibration: expected beside a rewrite"),
        (["verify", "a", "b", "--pool", "max"], "mean"),
        (["pack", "a"], "OUT, got none"),
        (["pack", "a", "b", "--symbols", "2"], "exponent-and-mantissa"),
        (["doctor", "--frobnicate"], "--frobnicate"),
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_that_says_expected_and_given_and_where_to_look(capsys, arguments, expected):
    line = refused(capsys, *arguments)
    assert "expected" in line and expected in line
    program = "gaugekit" if arguments[0] == "melt" else f"gaugekit {arguments[0]}"
    assert line.startswith(f"{program}: ") and line.rstrip().endswith(f"; see {program} --help")


def test_a_bare_call_prints_help(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "usage: gaugekit" in out
    assert all(f"    {verb}" in out for verb in VERBS)


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"gaugekit {gk.__version__}\n"
    assert gk.__version__ == importlib.metadata.version("gaugekit")


def test_the_documented_completion_names_every_verb():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert f'complete -o default -W "{" ".join(VERBS)}" gaugekit' in page


@pytest.mark.parametrize("verb", ["inspect", "verify", "pack"])
def test_a_name_of_the_hub_says_how_to_download_it(capsys, monkeypatch, tmp_path, verb):
    monkeypatch.chdir(tmp_path)
    rest = {"inspect": [], "verify": ["other"]}.get(verb, ["out"])
    line = refused(capsys, verb, "someone/some-model-1.5B", *rest)
    assert "hf download someone/some-model-1.5B --local-dir some-model-1.5B" in line
    (tmp_path / "someone").mkdir()  # then it is the name of a folder here, mistyped
    assert "hf download" not in refused(capsys, verb, "someone/some-model-1.5B", *rest)


@pytest.mark.parametrize("verb", ["inspect", "verify", "pack"])
@pytest.mark.parametrize(
    "file, word", [("pytorch_model.bin", "AutoModelForCausalLM"), ("m-q4.gguf", "gguf_file")]
)
def test_other_formats_say_how_to_convert(capsys, tmp_path, verb, file, word):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / file).write_bytes(b"\0")
    if file.endswith(".bin"):
        (folder / "config.json").write_text('{"model_type": "bert"}')
    rest = {"inspect": [], "verify": [folder]}.get(verb, [tmp_path / "out"])
    line = refused(capsys, verb, folder, *rest)
    assert word in line and f"{folder}-safetensors" in line
    command = shlex.split(line[line.index("python -c") :])
    compile(command[2], "the command that is shown", "exec")


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


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
        ("m.safetensors", b"", "it has 0 bytes"),
        ("pytorch_model.bin", b"PK\3\4\0\0\0\0" * 9, "AutoModelForCausalLM"),
        ("m.gguf", b"GGUF\3\0\0\0" * 9, "gguf_file"),
    ],
)  # fmt: skip
def test_files_that_newcomers_take_for_safetensors(capsys, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert message in refused(capsys, "pack", tmp_path / name, tmp_path / "out")


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}")
    assert "pip install gaugekit[hf]" in refused(capsys, "verify", tmp_path, tmp_path)


def test_bench_without_its_program_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("gaugekit.cli.calls.BENCH", tmp_path / "bench" / "run.py")
    assert "install gaugekit anew" in refused(capsys, "bench")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--shape 1x2x3", "--shape: expected with one --op, got 0 of them"),
        ("--op rans --op bitsback --shape 8", "--shape: expected with one --op, got 2 of them"),
        ("--op rans --shape 8 --device cuda", "--shape: expected with --device cpu, got cuda"),
        ("--op packed_linear --shape 1x64", "expected ROWSxINPUTSxOUTPUTS for packed_linear, whole numbers such as"),
        ("--op canonical_qr --shape 0", "--shape: expected SIZE for canonical_qr"),
        ("--op shaped_attention --shape 1x2x30x4", "--shape: expected WIDTH a multiple of HEADS, got 30 and 4"),
        ("--op rans --shape 1 --dtype fp32", "--dtype: expected one of bfloat16 for rans, got 'float32'"),
        ("--op rans --threads 1", "--threads: expected beside --shape, got it without"),
        ("--op rans --shape 1 --threads 0", "the cores of this machine, got 0"),
        ("--op rans --shape 1 --threads 100000", "the cores of this machine, got 100000"),
        ("--op packed_linear --shape 1x99999999x99999999", "--shape: expected one that fits into the"),
        ("--op gauge_linear --shape 1x1x1x1", "--shape: expected one that can be measured here, got 1x1x1x1"),
        ("--op bitsback --shape 3", "--shape: expected a DIMENSION of 16 or more, got 3"),
        ("--op nonlocal_energy --shape 1x1x1x1", "--shape: expected TOKENS of 2 or more, got 1"),
        ("--op canonical_qr --shape 99999999999999999999", "--shape: expected one that can be measured here, got 9"),
    ],
)  # fmt: skip
def test_bench_of_a_shape_that_is_none(capsys, line, message):
    assert message in refused(capsys, "bench", *line.split())


def test_bench_of_a_shape_of_ones_own(capsys):
    line = "bench --op canonical_qr --shape 24 --shape 8 --threads 1 --budget 0.01 --json"
    assert main(line.split()) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["shape"], row["dtype"], row["threads"]) for row in rows] == [
        (f"{size}x{size}, Q and R", "float64", 1) for size in (24, 8)
    ]
    assert all(row["without_us"] > 0 for row in rows)
    assert main(["bench", "--list", "--only", "nothing at all"]) == 0
    listed = capsys.readouterr().out
    from registry import BENCHMARKS, OWN_SHAPES

    assert BENCHMARKS.keys() == OWN_SHAPES.keys()
    assert all(
        f"{op} --shape {own.pattern}, such as {own.example}" in listed for op, own in OWN_SHAPES.items()
    )
    for op, own in OWN_SHAPES.items():
        assert len(own.read(op, own.example, None)[0]) == own.pattern.count("x") + 1


def test_bench_of_a_small_layer_takes_no_more_layers_than_a_model_has(capsys):
    line = "bench --op packed_linear --shape 1x64x64 --threads 1 --budget 0.01 --json"
    assert main(line.split()) == 0
    (row, _) = json.loads(capsys.readouterr().out)
    assert row["layers"] == 512 and "512 layers a call, whose weights a cache may hold" in row["label"]


def test_an_installed_bench_keeps_no_rows(capsys, monkeypatch):
    """A wheel has no bench/results; its rows name the version that was measured."""
    import run

    monkeypatch.setattr(run, "CHECKOUT", False)
    monkeypatch.delenv("GAUGEKIT_COMMIT", raising=False)
    assert run.commit() == f"gaugekit {gk.__version__}"
    monkeypatch.setattr("gaugekit.cli.calls.benchmarks", lambda: run)
    assert "--save: expected a source checkout" in refused(capsys, "bench", "--save")


def test_bench_names_the_operators_it_knows(capsys):
    assert "nothing" in refused(capsys, "bench", "--op", "nothing")


def test_bench_takes_what_its_program_takes(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = capsys.readouterr().out
    options = argparse.ArgumentParser()
    calls.benchmarks().add_options(options)
    assert all(word in shown for action in options._actions for word in action.option_strings)
    assert main(["bench", "--list", "--op", "shaped_combine", "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)
    assert cases and all(case["op"] == "shaped_combine" for case in cases)
    assert "--once: expected with --device cuda" in refused(capsys, "bench", "--once")


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
