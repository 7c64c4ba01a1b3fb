"""Every verb on a small model: the JSON it prints, its exit status, and what stands on stderr."""

import fcntl
import json
import os
import re
import struct
import subprocess
import termios

import pytest
import torch
from safetensors.torch import load_file, save_file

import gaugekit as gk
import tiny_directory
from gaugekit.cli import main
from tiny_directory import BIAS, LAYERS, SQUARE
from warm import python

REMOVED = {
    "value_output": SQUARE,
    "query_key": SQUARE,
    "key_bias": BIAS,
    "value_bias": BIAS,
    "total": 2 * (SQUARE + BIAS),
}
TRIANGLE = SQUARE * 7 // 16  # d (d − 1)/2 in place of d² for heads of width d = 8
TURNED = REMOVED | {"value_output": TRIANGLE, "query_key": TRIANGLE, "total": 2 * (TRIANGLE + BIAS)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_directory.write(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture
def run(capsys):
    """Runs a command line with --json and returns (exit status, the one JSON value on stdout)."""

    def call(*arguments):
        status = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert err == ""
        return status, json.loads(out)

    return call


def test_inspect(run, model):
    status, found = run("inspect", model)
    groups = [group for group in REMOVED if group != "total"]
    assert status == 0 and {group: found["unobservable"][group] for group in groups} == {
        group: REMOVED[group] for group in groups
    }
    assert found["removable"] == REMOVED["total"]
    assert found["parameters"] == sum(t.numel() for t in load_file(model / "model.safetensors").values())
    assert len(found["layers"]) == LAYERS


def test_inspect_reads_text(run, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A sentence that is long enough to be read. Another sentence follows right behind it.\n")
    status, found = run("inspect", model, "--text", text)
    assert status == 0 and found == gk.inspect(model, text=text).fields
    _, other = run("inspect", model)  # by default, of sentences of Python's documentation
    for own, theirs in zip(found["layers"], other["layers"], strict=True):
        assert 0 < abs(own["token_cosine"] - theirs["token_cosine"]) < 2


@pytest.mark.parametrize(
    "options",
    [[], ["--dense"], ["--rows", "shared_partition"], ["--rows", "triangular"], ["--dtype", "bfloat16"]],
)
def test_convert_then_verify(run, model, tmp_path, options):
    out = tmp_path / "out"
    status, found = run("convert", model, out, "--gauge", *options)
    assert status == 0
    removed = TURNED if "triangular" in options else REMOVED
    gone = found["parameters_before"] - found["parameters_after"]
    assert gone == (0 if "--dense" in options else removed["total"])
    assert found["steps"][0]["removed"] == removed
    assert found["bytes_before"] == (model / "model.safetensors").stat().st_size
    assert found["bytes_after"] == (out / "model.safetensors").stat().st_size
    status, proof = run("verify", model, out, "--pool", "mean", *(options if "--dtype" in options else []))
    assert status == 0 and proof["ok"] is True
    assert {"noise", "relative_error", "max_abs_error", "min_cosine"} <= set(proof)


def test_verify_exits_1_when_the_models_differ(run, model, tmp_path):
    """One weight moved by a thousandth is more than rounding."""
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("attention.self.value.weight"))
    weights[name] *= 1.001
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    status, proof = run("verify", model, other)
    assert status == 1 and proof["ok"] is False and proof["relative_error"] > 1.5 * proof["noise"]


@pytest.mark.parametrize("whole", [True, False], ids=["directory", "file"])
def test_pack_and_unpack(run, model, tmp_path, whole):
    source = model if whole else model / "model.safetensors"
    status, found = run("pack", source, tmp_path / "packed")
    assert status == 0 and {"bytes_before", "bytes_after", "ratio", "bits_per_weight"} <= set(found)
    status, _ = run("unpack", tmp_path / "packed", tmp_path / "again")
    assert status == 0
    for path in [source] if source.is_file() else source.iterdir():
        again = tmp_path / "again" / path.name if whole else tmp_path / "again"
        assert again.read_bytes() == path.read_bytes()


def test_pack_options(run, capsys, model, tmp_path):
    status, found = run(
        "pack", model, tmp_path / "p", "--verify", "--memory", "0.1GiB", "--symbols", "high-byte"
    )
    assert status == 0 and found["verified"] is True
    for size, expected in (("9x", "a size such as 500MB"), ("1MB", "67,108,864")):
        assert main(["pack", str(model), str(tmp_path / "q"), "--memory", size]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"expected {expected}" in err
    status, found = run("convert", tmp_path / "p", tmp_path / "c", "--gauge", "--pack")
    assert status == 0 and [step["rewrite"] for step in found["steps"]] == ["gauge", "pack"]
    assert found["bytes_after"] == (tmp_path / "c" / "model.safetensors").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "p"]
    assert run("verify", model, tmp_path / "c")[1]["ok"]


def test_an_output_inside_the_input_is_refused(capsys, model):
    assert main(["convert", str(model), str(model / "inside"), "--gauge"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "inside" in err and not (model / "inside").exists()


def test_without_json_there_is_a_text(capsys, model):
    assert main(["inspect", str(model)]) == 0
    text = capsys.readouterr().out
    assert f"{REMOVED['total']:,}" in text
    assert [line[:9] for line in text.splitlines() if line.startswith("  layer ")] == [
        "  layer 0",
        "  layer 1",
    ]
    assert "ranks 8 of 8" in text and "singular_values" not in text


def test_every_text_ends_with_what_was_done_and_what_comes_next(capsys, model, tmp_path):
    """One sentence that names what was written and where, and a command that runs as it stands."""
    fixed, packed, again, text = (tmp_path / name for name in ("a b", "packed", "again", "text.txt"))
    text.write_text("".join(f"Sentence {n} is long enough to be read and learnt from.\n\n" for n in range(9)))
    healed = tmp_path / "healed"
    heal = ["heal", fixed, model, healed, "--text", text, "--steps", "2"]
    for command, written, following in (
        (["inspect", model, "--text", text], None, f"gaugekit convert {model} OUT --gauge"),
        (["convert", model, fixed, "--gauge"], fixed, f"gaugekit verify {model} '{fixed}'"),
        (["verify", model, fixed, "--text", text], None, f"gaugekit pack '{fixed}' OUT"),
        (heal, healed, f"gaugekit verify {model} {healed}"),
        (["pack", fixed, packed], packed, f"gaugekit unpack {packed} RESTORED"),
        (["unpack", packed, again], again, f"use {again}"),
    ):
        assert main([*map(str, command)]) == 0
        *_, done, following_line = capsys.readouterr().out.splitlines()
        assert done.endswith(".") and done.count(". ") == 0, done
        assert (str(written) if written else "nothing was written") in done
        assert following_line.startswith(f"next: {following}")


def test_verify_shows_limits_beside_figures(capsys, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A sentence that is long enough to be read.\n")
    verify = ["verify", str(model), str(model), "--text", str(text)]
    assert main(verify) == 0
    assert re.search(r"error +1\.00 × noise, limit 1\.5 ", capsys.readouterr().out)
    assert main([*verify, "--dtype", "float64"]) == 0
    assert "limit 1e-12 of the output" in capsys.readouterr().out


def environment():
    return {**os.environ, "PYTHONWARNINGS": "ignore::RuntimeWarning"}


def test_piped_output_is_json_alone_and_stderr_is_empty(model, tmp_path):
    command = [*python(), "-m", "gaugekit", "convert", model, tmp_path / "out", "--gauge", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1 and isinstance(json.loads(done.stdout), dict)


def test_on_a_terminal_there_is_a_progress_bar(model, tmp_path):
    reader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [*python(), "-m", "gaugekit", "pack", model, tmp_path / "out", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, env=environment())
    os.close(terminal)
    shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert done.returncode == 0 and "pack: " in shown
    assert isinstance(json.loads(done.stdout), dict)


def test_bench_prints_a_list(run):
    status, rows = run("bench", "--op", "shaped_combine", "--quick", "--only", "causal forward float32")
    assert status == 0 and rows
    assert {"op", "shape", "dtype", "baseline", "median_ms", "ratio", "machine"} <= set(rows[0])
    assert torch.get_num_threads() >= 1
