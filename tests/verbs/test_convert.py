"""The engine: what it writes, what it counts, and that a kill costs only the work of one shard."""

import json
import os
import shutil
import signal
import subprocess

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

import gaugekit as gk  # noqa: E402
import gaugekit.integrations.transformers  # noqa: E402
import tiny  # noqa: E402
from gaugekit.checkpoint.reader import Checkpoint  # noqa: E402
from gaugekit.checkpoint.writer import CERTIFICATE, Writer  # noqa: E402
from gaugekit.files.durable import sha256  # noqa: E402
from gaugekit.files.staging import MANIFEST  # noqa: E402
from gaugekit.nn.triangle import unpack_triangle  # noqa: E402
from gaugekit.ops.gauge_linear.layout import free_rows  # noqa: E402
from gaugekit.symmetry import GaugeFix  # noqa: E402
from gaugekit.verbs.convert import convert  # noqa: E402
from warm import python  # noqa: E402


def bert(path, shards="1GB", **changes):
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3}
    config = transformers.BertConfig(
        **{**sizes, "intermediate_size": 32, "max_position_embeddings": 16, **changes}
    )
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(path, max_shard_size=shards)
    (path / "vocab.txt").write_text("one\ntwo\n")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"old weights")
    return path


def contents(path):
    """Every file of a directory, by relative name."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("shards", ["1GB", "8KB"])
def test_compact(tmp_path, shards):
    source = bert(tmp_path / "m", shards)
    before = contents(source)
    seen = []
    report = convert(
        source, tmp_path / "out", [GaugeFix()], progress=lambda done, total: seen.append((done, total))
    )
    assert contents(source) == before
    removed = {"value_output": 576, "query_key": 576, "key_bias": 72, "value_bias": 72, "total": 1296}
    assert report["steps"] == [{"rewrite": "gauge", "claim": "exact", "rows": "balanced", "removed": removed}]
    assert report["parameters_before"] - report["parameters_after"] == 1296
    assert report["parameters_before"] == transformers.BertModel.from_pretrained(source).num_parameters()
    assert 0 < report["invariance_error"] < 1e-13
    assert report.notes == ["not copied: pytorch_model.bin (other weights)"]
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == 2 * report["bytes_before"]

    out = Checkpoint(tmp_path / "out")
    old = Checkpoint(source)
    attention = "encoder.layer.1.attention"
    assert out.shape(f"{attention}.self.key.free") == (3, 16, 8)
    assert out.shape(f"{attention}.self.value.rows") == (3, 8)
    assert f"{attention}.self.key.bias" not in out.names()
    untouched = [
        name for name in old.names() if ".attention.self" not in name and ".output.dense" not in name
    ]
    assert len(untouched) > 20 and all(torch.equal(old.read(name), out.read(name)) for name in untouched)
    config = dict(out.config)
    quantization = config.pop("quantization_config")
    assert config == old.config
    assert quantization["version"] == 1 and len(quantization["modules"]) == 6
    assert (tmp_path / "out" / "vocab.txt").read_text() == "one\ntwo\n"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert not list(tmp_path.glob("out.partial")) and not (tmp_path / "out" / MANIFEST).exists()

    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert len(modes) == 1, "weights are as readable as the files beside them"

    certificate = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    assert certificate["source_sha256"] == old.sha256()
    assert certificate["output_sha256"] == {file: sha256(tmp_path / "out" / file) for file in out.files}
    assert [entry["layer"] for entry in certificate["layers"]] == [0, 1, 2]


def test_what_an_earlier_truncation_left_at_zero_is_counted_too(tmp_path):
    """It stands in no config, so no plan sees it; the steps add up to what went all the same."""
    model = tiny.bert()
    gk.rank.truncate(model, rank=4)
    model.save_pretrained(tmp_path / "m")
    report = convert(tmp_path / "m", tmp_path / "out", [GaugeFix()])
    removed = [step["removed"]["total"] for step in report["steps"]]
    assert sum(removed) == report["parameters_before"] - report["parameters_after"] > removed[0]
    assert report["steps"][-1]["removed"]["idle_channels"] > 0
    assert gk.verify(tmp_path / "m", tmp_path / "out")["ok"]
    dense = convert(tmp_path / "m", tmp_path / "dense", [GaugeFix()], dense=True)
    assert len(dense["steps"]) == 1


def test_dense_is_the_plain_layout(tmp_path):
    source = bert(tmp_path / "m")
    report = convert(source, tmp_path / "out", [GaugeFix(rows="shared_partition")], dense=True)
    old, out = Checkpoint(source), Checkpoint(tmp_path / "out")
    assert out.config == old.config
    assert out.names() == old.names()
    assert all(
        out.shape(name) == old.shape(name) and out.dtype(name) == old.dtype(name) for name in old.names()
    )
    assert out.read("encoder.layer.0.attention.self.key.bias").count_nonzero() == 0
    assert report["parameters_after"] == report["parameters_before"]
    tokens = torch.randint(0, 40, (2, 9))
    a, b = (
        transformers.BertModel.from_pretrained(path).double().eval() for path in (source, tmp_path / "out")
    )
    a, b = a(tokens).last_hidden_state, b(tokens).last_hidden_state
    assert (a - b).norm() < 1e-5 * a.norm()  # weights were rounded once more to float32


def test_turned_heads_are_written_without_their_zeros(tmp_path):
    source = bert(tmp_path / "m")
    report = convert(source, tmp_path / "out", [GaugeFix(rows="triangular")])
    removed = {"value_output": 252, "query_key": 252, "key_bias": 72, "value_bias": 72, "total": 648}
    assert report["steps"] == [
        {"rewrite": "gauge", "claim": "exact", "rows": "triangular", "removed": removed}
    ]
    assert report["parameters_before"] - report["parameters_after"] == 648
    out = Checkpoint(tmp_path / "out")
    key = "encoder.layer.1.attention.self.key"
    assert [out.shape(f"{key}.{name}") for name in ("free", "rows", "triangle")] == [
        (3, 16, 8),
        (3, 8),
        (3, 36),
    ]
    assert f"{key}.bias" not in out.names() and f"{key}.weight" not in out.names()
    spec = out.config["quantization_config"]["modules"][key]
    arguments = {"heads": 3, "inputs": 24, "width": 8, "bias": False}
    assert spec == {"form": "triangular_projection", "arguments": arguments}
    convert(source, tmp_path / "dense", [GaugeFix(rows="triangular")], dense=True)
    dense = Checkpoint(tmp_path / "dense")
    assert dense.names() == Checkpoint(source).names() and dense.config == Checkpoint(source).config
    heads, rows = dense.read(f"{key}.weight").unflatten(0, (3, 8)).mT, out.read(f"{key}.rows")

    def taken(index):
        return heads.gather(1, index.long()[..., None].expand(-1, -1, 8))

    assert torch.equal(taken(free_rows(rows, 24)), out.read(f"{key}.free"))
    assert torch.equal(taken(rows), unpack_triangle(out.read(f"{key}.triangle"), 8))
    again = convert(tmp_path / "dense", tmp_path / "again", [GaugeFix(rows="triangular")], dense=True)
    assert again["invariance_error"] == 0
    assert all(
        torch.equal(Checkpoint(tmp_path / "again").read(name), dense.read(name)) for name in dense.names()
    )


def test_what_a_truncation_left_of_the_keys_is_turned(tmp_path):
    """R (R − 1)/2 numbers go from keys of rank R; their queries keep the channels in use alone."""
    source = bert(tmp_path / "m")
    truncate = gk.rank.Truncate(6)
    fix = GaugeFix(rows="triangular", key_ranks=truncate.of(Checkpoint(source).config))
    report = convert(source, tmp_path / "out", [truncate, fix])
    assert report["steps"][1]["removed"]["query_key"] == 3 * 3 * 15
    gone = sum(step["removed"]["total"] for step in report["steps"])
    assert report["parameters_before"] - report["parameters_after"] == gone
    out, key = Checkpoint(tmp_path / "out"), "encoder.layer.0.attention.self.key"
    spec = out.config["quantization_config"]["modules"][key]["arguments"]
    assert (spec["width"], spec["padded"]) == (6, 8) and out.shape(f"{key}.triangle") == (3, 21)
    convert(source, tmp_path / "rank", [truncate], dense=True)
    tokens = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        models = (transformers.BertModel.from_pretrained(tmp_path / name).eval() for name in ("rank", "out"))
        expected, got = (model(tokens).last_hidden_state for model in models)
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_dtype(tmp_path):
    source = bert(tmp_path / "m")
    convert(source, tmp_path / "out", [GaugeFix()], dtype="bf16")
    out = Checkpoint(tmp_path / "out")
    kinds = {out.dtype(name) for name in out.names()}
    assert kinds == {torch.bfloat16, torch.int32}
    assert out.config["dtype"] == "bfloat16"
    convert(source, tmp_path / "plain", [], dtype=torch.float64)
    assert torch.equal(
        Checkpoint(tmp_path / "plain").read("pooler.dense.weight"),
        Checkpoint(source).read("pooler.dense.weight").double(),
    )


def test_numbers_too_large_for_the_dtype_are_an_error(tmp_path):
    source = bert(tmp_path / "m")
    tensors = safetensors_torch.load_file(source / "model.safetensors")
    tensors["pooler.dense.weight"][0, 0] = 1e6
    safetensors_torch.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="pooler.dense.weight holds numbers too large for torch.float16"):
        convert(source, tmp_path / "out", [GaugeFix()], dtype="float16")
    tensors["encoder.layer.1.attention.self.key.weight"][0, 0] = torch.nan
    safetensors_torch.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="layer.1.attention.self.key.weight: expected finite numbers"):
        convert(source, tmp_path / "out", [GaugeFix()])
    assert not (tmp_path / "out").exists()


class Stops(GaugeFix):
    """A gauge fix that is interrupted when it comes to its third layer."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def layer(self, view, statistics=None):
        self.seen += 1
        if self.seen == 3:
            raise KeyboardInterrupt
        return super().layer(view, statistics)


class Counts(GaugeFix):
    def __init__(self, rows="balanced"):
        super().__init__(rows)
        self.seen = 0

    def layer(self, view, statistics=None):
        self.seen += 1
        return super().layer(view, statistics)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 10 kB, so that a tiny model has several."""
    monkeypatch.setattr(Writer.__init__, "__kwdefaults__", {"resume": True, "shard_bytes": 10_000})


def test_resume_after_an_interruption(tmp_path, small_shards):
    source = bert(tmp_path / "m")
    expected = convert(source, tmp_path / "whole", [GaugeFix()])
    assert len(Checkpoint(tmp_path / "whole").files) > 3
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", [Stops()])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "shard-00099.safetensors").write_bytes(b"torn")
    counts = Counts()
    report = convert(source, tmp_path / "out", [counts])
    assert counts.seen < 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {**report.fields, "seconds": 0} == {**expected.fields, "seconds": 0}


@pytest.mark.parametrize("change", ["arguments", "source", "versions"])
def test_another_job_is_refused_and_may_start_over(tmp_path, small_shards, monkeypatch, change):
    source = bert(tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", [Stops()])
    before = contents(tmp_path / "out.partial")
    if change == "source":
        file = source / "model.safetensors"
        status, tensors = file.stat(), safetensors_torch.load_file(file)
        tensors["pooler.dense.bias"] += 1
        safetensors_torch.save_file(tensors, file, {"format": "pt"})
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file.stat().st_size == status.st_size
    elif change == "versions":
        monkeypatch.setattr(torch, "__version__", "2.0")
    counts = Counts("shared_partition" if change == "arguments" else "balanced")
    with pytest.raises(ValueError, match="another call .* differs.*; delete that folder"):
        convert(source, tmp_path / "out", [counts])
    assert counts.seen == 0 and contents(tmp_path / "out.partial") == before
    convert(source, tmp_path / "out", [counts], resume=False)
    assert counts.seen == 3


def test_a_copy_elsewhere_with_other_times_is_the_same_source(tmp_path, small_shards):
    source = bert(tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", [Stops()])
    shutil.copytree(source, tmp_path / "moved", copy_function=shutil.copyfile)
    counts = Counts()
    convert(tmp_path / "moved", tmp_path / "out", [counts])
    assert counts.seen < 3


def test_resume_after_a_kill_between_naming_the_shards_and_the_rename(tmp_path, small_shards, monkeypatch):
    source = bert(tmp_path / "m")
    convert(source, tmp_path / "whole", [GaugeFix()])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", [GaugeFix()])
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    counts = Counts()
    convert(source, tmp_path / "out", [counts])
    assert counts.seen == 0  # every layer was on the disk
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


SLOW = """
import sys, time
import gaugekit
from gaugekit import symmetry
from gaugekit.checkpoint.writer import Writer
Writer.__init__.__kwdefaults__["shard_bytes"] = 10_000
class Slow(symmetry.GaugeFix):
    def layer(self, view, statistics=None):
        print("layer", flush=True)
        time.sleep(0.5)
        return super().layer(view, statistics)
gaugekit.convert(sys.argv[1], sys.argv[2], [Slow()])
"""


def test_resume_after_sigkill(tmp_path, small_shards):
    source = bert(tmp_path / "m")
    convert(source, tmp_path / "whole", [GaugeFix()])
    command = [*python(), "-W", "ignore", "-c", SLOW, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        for _ in range(3):  # the first layer is on disk once the second has been added
            assert process.stdout.readline() == b"layer\n"
        with pytest.raises(ValueError, match="another process is writing"):
            convert(source, tmp_path / "out", [GaugeFix()])
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # until it has ended
    assert not (tmp_path / "out").exists()
    counts = Counts()
    convert(source, tmp_path / "out", [counts])
    assert counts.seen < 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("pack", [False, True])
def test_it_goes_on_where_it_stopped_unless_told_to_start_over(tmp_path, small_shards, pack, resume):
    """The first of three layers was on the disk when the third was interrupted."""
    source = bert(tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", [Stops()], pack=pack)
    counts = Counts()
    convert(source, tmp_path / "out", [counts], pack=pack, resume=resume)
    assert counts.seen == (2 if resume else 3)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dense": True}], ids=lambda o: next(iter(o)))
def test_a_job_with_other_options_takes_nothing_over(tmp_path, small_shards, options):
    source = bert(tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", [Stops()])
    counts = Counts()
    try:
        convert(source, tmp_path / "out", [counts], **options)
    except ValueError:  # refused, until it is told to start over
        assert counts.seen == 0 and not (tmp_path / "out").exists()
        convert(source, tmp_path / "out", [counts], resume=False, **options)
    assert counts.seen == 3
    convert(source, tmp_path / "whole", [GaugeFix()], **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
