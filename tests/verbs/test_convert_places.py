"""A conversion writes and removes nothing but what it made, goes on in every phase, and one process at a time."""

import errno
import json
import os
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")

import tiny  # noqa: E402
from gaugekit import codec, rank  # noqa: E402
from gaugekit.checkpoint import writer  # noqa: E402
from gaugekit.checkpoint.reader import Checkpoint  # noqa: E402
from gaugekit.checkpoint.writer import SCRATCH  # noqa: E402
from gaugekit.cli import main  # noqa: E402
from gaugekit.files.staging import MANIFEST  # noqa: E402
from gaugekit.rank import page  # noqa: E402
from gaugekit.rewrite import Later, engine  # noqa: E402
from gaugekit.symmetry import GaugeFix  # noqa: E402
from gaugekit.verbs.convert import convert  # noqa: E402

TEXT = (
    "A rewrite may ask for text, and the engine reads it once. Another sentence stands beside the first one. "
    * 9
)


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    tiny.bert().save_pretrained(tmp_path / "m")
    tiny.add_tokenizer(tmp_path / "m")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "m"


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["out.unpacked", "out.calibration", "out.packed", "out.scratch"])
@pytest.mark.parametrize("options", [["--gauge", "--pack"], ["--energy", "0.9", "--calibration", "text.txt"]])
def test_what_stands_beside_the_output_stays(source, tmp_path, monkeypatch, name, options):
    """A source and a folder of the user's, named as scratch might be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    assert main(["convert", "m", "out", *options]) == 0
    after = contents(tmp_path)
    assert {key: after[key] for key in before} == before
    assert {path.split("/")[0] for path in set(after) - set(before)} == {"out"}


def test_a_source_whose_name_is_that_of_scratch(source, tmp_path):
    source.rename(tmp_path / "out.unpacked")
    before = contents(tmp_path / "out.unpacked")
    convert(tmp_path / "out.unpacked", tmp_path / "out", [GaugeFix()], pack=True)
    assert contents(tmp_path / "out.unpacked") == before
    (tmp_path / "out.unpacked").rename(tmp_path / "two.partial")
    with pytest.raises(ValueError, match="target: expected a directory beside the source"):
        convert(tmp_path / "two.partial", tmp_path / "two", [GaugeFix()])
    assert contents(tmp_path / "two.partial") == before


def test_a_page_takes_no_file_of_the_source(source, tmp_path):
    (source / "report.html").write_text("mine")
    convert(source, tmp_path / "out", [rank.Truncate(4)], pages=page.pages)
    assert (tmp_path / "out" / "report.html").read_text() == "mine"
    assert "<html" in (tmp_path / "out" / "gaugekit_report.html").read_text()


class Stop(BaseException):
    """Ends a call in the middle."""


def end_at(patch, owner, name, before=1, after=0):
    """``owner.name`` raises Stop when called for the ``before``-th time, or as it returns for the ``after``-th."""
    real, calls = getattr(owner, name), []

    def stopping(*arguments, **options):
        calls.append(None)
        if len(calls) == before:
            raise Stop
        result = real(*arguments, **options)
        if len(calls) == after:
            raise Stop
        return result

    patch.setattr(owner, name, stopping)


PHASES = {  # where a conversion that packs is ended
    "first shard": (writer, "save_tensors"),
    "before packing": (codec, "pack"),
    "packed, not noted": (codec, "pack", 0, 1),
    "moving": (engine, "_move", 0, 1),
    "publishing": (engine.Staging, "publish", 2),
}


@pytest.mark.parametrize("phase", PHASES)
def test_packing_goes_on_in_every_phase(source, tmp_path, monkeypatch, phase):
    convert(source, tmp_path / "whole", [GaugeFix()], pack=True)
    with monkeypatch.context() as patch:
        end_at(patch, *PHASES[phase])
        with pytest.raises(Stop):
            convert(source, tmp_path / "out", [GaugeFix()], pack=True)
    assert not (tmp_path / "out").exists()
    report = convert(source, tmp_path / "out", [GaugeFix()], pack=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert [step["rewrite"] for step in report["steps"]] == ["gauge", "pack"]
    assert report["bytes_after"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out", "text.txt", "whole"]


def test_what_was_found_is_not_sought_again(source, tmp_path, monkeypatch):
    """A kill while layers are rewritten costs neither the calibration nor the search for ranks."""
    found = []

    def rewrites(folder):
        found.append(rank.prepare(source, tmp_path / "text.txt", energy=0.8, work_directory=folder))
        return found[-1:]

    later = Later({"energy": 0.8}, rewrites)
    with monkeypatch.context() as patch:
        end_at(patch, writer, "save_tensors")
        with pytest.raises(Stop):
            convert(source, tmp_path / "out", later, calibration=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr("gaugekit.rank.preparation.needed", None)
        patch.setattr("gaugekit.calibration.streaming.Pass.layer", None)
        convert(source, tmp_path / "out", later, calibration=tmp_path / "text.txt")
    assert found[0].ranks == found[1].ranks and not (tmp_path / "out" / SCRATCH).exists()
    with pytest.raises(ValueError, match="new or empty"):
        convert(source, tmp_path / "out", later, calibration=tmp_path / "text.txt")


def test_another_text_after_a_kill_is_refused(source, tmp_path, monkeypatch):
    arguments = {"calibration": tmp_path / "text.txt"}
    with monkeypatch.context() as patch:
        end_at(patch, writer, "save_tensors")
        with pytest.raises(Stop):
            convert(source, tmp_path / "out", [rank.Truncate(4, aware=True)], **arguments)
    (tmp_path / "text.txt").write_text(TEXT.replace("once", "twice"))
    with pytest.raises(ValueError, match="digests calibration differs"):
        convert(source, tmp_path / "out", [rank.Truncate(4, aware=True)], **arguments)


def test_a_second_process_is_refused(source, tmp_path):
    def second(done, total):
        if (tmp_path / "out.partial" / MANIFEST).exists():
            with pytest.raises(ValueError, match="another process is writing"):
                convert(source, tmp_path / "out", [GaugeFix()])

    convert(source, tmp_path / "out", [GaugeFix()], progress=second)
    assert Checkpoint(tmp_path / "out").names()


def test_bad_input_leaves_nothing_behind(source, tmp_path):
    """What could not be finished by the same call does not stand in the way of another."""
    file = source / "model.safetensors"
    tensors = codec.load_file(file)
    tensors["encoder.layer.1.attention.self.key.weight"][0, 0] = torch.nan
    codec.save_file(tensors, file)
    with pytest.raises(ValueError, match="expected finite numbers"):
        convert(source, tmp_path / "out", [GaugeFix()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "text.txt"]


def test_the_disk_need_is_that_of_the_result(source, tmp_path, monkeypatch):
    """A disk that holds the compact result but not the source is large enough; one that does not is refused."""
    size = (source / "model.safetensors").stat().st_size
    others = sum(path.stat().st_size for path in source.iterdir()) - size
    usage = shutil.disk_usage(tmp_path)
    half = size // 2 + others + (1 << 20) + 20_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=half))
    with pytest.raises(ValueError, match="bytes free in"):
        convert(source, tmp_path / "out", [GaugeFix()])
    convert(source, tmp_path / "out", [GaugeFix()], dtype="bfloat16")
    with pytest.raises(ValueError, match="bytes free in"):
        convert(source, tmp_path / "packed", [GaugeFix()], dtype="bfloat16", pack=True)
    later = Later({}, lambda folder: [GaugeFix()])
    with pytest.raises(OSError) as error:
        convert(source, tmp_path / "later", later)
    assert error.value.errno == errno.ENOSPC
    assert json.loads((tmp_path / "later.partial" / MANIFEST).read_text())["done"] == 0


def test_a_kill_just_after_the_result_got_its_name(source, tmp_path, monkeypatch):
    expected = convert(source, tmp_path / "whole", [GaugeFix()])
    with monkeypatch.context() as patch:
        end_at(patch, os, "rename", 0, 1)
        with pytest.raises(Stop):
            convert(source, tmp_path / "out", [GaugeFix()])
    assert (tmp_path / "out" / MANIFEST).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(GaugeFix, "layer", None)
        report = convert(source, tmp_path / "out", [GaugeFix()])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {**report.fields, "seconds": 0} == {**expected.fields, "seconds": 0}
