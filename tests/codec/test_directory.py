"""Packing directories: shards and their index, resuming after kills, verifying, bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gaugekit as gk
from gaugekit.codec.directories import job
from gaugekit.codec.files import stream
from gaugekit.codec.tensors.pieces import cuts
from gaugekit.files.staging import LOCK, MANIFEST
from warm import python

INDEX = "model.safetensors.index.json"


def sharded(path, shards=4, rows=300):
    """A directory like a model's: shards, index, config, and a file of another kind in a folder."""
    path.mkdir()
    where, total = {}, 0
    for shard in range(1, shards + 1):
        file = f"model-{shard:05}-of-{shards:05}.safetensors"
        generator = torch.Generator().manual_seed(shard)
        weight = (torch.randn(rows, 500, generator=generator) * 0.02).bfloat16()
        tensors = {f"layer.{shard}.weight": weight, f"layer.{shard}.steps": torch.arange(10)}
        save_file(tensors, path / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
    (path / "config.json").write_text('{"model_type": "none"}')
    (path / "sub").mkdir()
    (path / "sub" / "notes.txt").write_text("kept")
    return path


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def source(tmp_path):
    return sharded(tmp_path / "m")


def test_shards_index_and_back(source, tmp_path):
    before = contents(source)
    report = gk.codec.pack(source, tmp_path / "p", verify=True)
    assert contents(source) == before and report["verified"] is True
    index = json.loads((tmp_path / "p" / INDEX).read_text())
    stored = 0
    for file in (tmp_path / "p").glob("*.safetensors"):
        with gk.codec.safe_open(file) as opened:
            stored += sum(opened.stored_bytes(name) for name in opened.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == stored < report["bytes_after"] < report["bytes_before"]
    assert index["weight_map"] == json.loads(before[INDEX])["weight_map"]
    gk.codec.unpack(tmp_path / "p", tmp_path / "again")
    assert contents(tmp_path / "again") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "m", "p"]


DEEP = b'{"weight_map": ' + b"[" * 100_000
NO_INDEX = {
    "torn": b"{",
    "a list": b"[]",
    "deep": DEEP,
    "a map of null": b'{"weight_map": null, "metadata": {"gaugekit": "mine"}}',
    "no metadata": b'{"weight_map": {"layer.1.weight": "model-00001-of-00004.safetensors"}}',
    "not UTF-8": '{"weight_map": {}, "metadata": {}}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", NO_INDEX)
def test_an_index_that_is_none_is_copied(source, tmp_path, name):
    (source / INDEX).write_bytes(NO_INDEX[name])
    gk.codec.pack(source, tmp_path / "p", verify=True)
    assert (tmp_path / "p" / INDEX).read_bytes() == NO_INDEX[name]
    gk.codec.unpack(tmp_path / "p", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)


@pytest.mark.parametrize(
    "name", [INDEX, "model.fp16.safetensors.index.json", "sub/other.safetensors.index.json"]
)
def test_an_index_that_promises_what_is_not_there_is_refused(source, tmp_path, name):
    shard = "../" * name.count("/") + "model-00001-of-00004.safetensors"
    for where, message in (
        ({"a": "absent.safetensors"}, "names the shard 'absent.safetensors', which is not there"),
        ({"a": "/dev/null"}, "names the shard '/dev/null'"),
        (
            {"layer.1.weight": shard, "layer.2.weight": shard},
            "which is not there" if "/" in name else "'layer.2.weight'",
        ),
    ):
        (source / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        for verb in (gk.codec.pack, gk.codec.unpack):
            if verb is gk.codec.unpack:
                (source / name).rename(tmp_path / "aside")
                gk.codec.pack(source, tmp_path / "p")
                (tmp_path / "aside").rename(tmp_path / "p" / name)
            with pytest.raises(ValueError, match=message):
                verb(tmp_path / "p" if verb is gk.codec.unpack else source, tmp_path / "out")
            assert not list(tmp_path.glob("out*"))
        for path in sorted((tmp_path / "p").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()


class Stop(BaseException):
    """What a test interrupts with."""


def stopping(done, total):
    if done > 0.6 * total:
        raise Stop


def test_resume_goes_on_behind_the_last_whole_file(source, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        gk.codec.pack(source, tmp_path / "p", progress=stopping)
    assert not (tmp_path / "p").exists()
    coded = []
    encode = stream.encode_bytes
    monkeypatch.setattr(stream, "encode_bytes", lambda *a, **k: coded.append(1) or encode(*a, **k))
    report = gk.codec.pack(source, tmp_path / "p")
    assert 0 < len(coded) < 4
    expected = gk.codec.pack(source, tmp_path / "q")
    assert contents(tmp_path / "p") == contents(tmp_path / "q")
    assert {**report.fields, "seconds": 0} == {**expected.fields, "seconds": 0}


def replaced(source, tmp_path):
    """Other weights under the same names, of the same sizes and times."""
    for path in sorted(source.glob("*.safetensors")):
        times, data = path.stat(), bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = {
    "weights": replaced,
    "a shard gone": lambda source, tmp_path: [
        (source / name).unlink() for name in ("model-00001-of-00004.safetensors", INDEX)
    ],
    "a result damaged": lambda source, tmp_path: (
        tmp_path / "out.partial" / "model-00001-of-00004.safetensors"
    ).write_bytes(b"damaged"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_what_a_killed_call_finished_is_compared_with_the_source(source, tmp_path, verb, change):
    def given():
        if verb == "pack":
            return source
        return gk.codec.pack(source, tmp_path / "p") and tmp_path / "p"

    folder, run = given(), getattr(gk.codec, verb)
    with pytest.raises(Stop):
        run(folder, tmp_path / "out", progress=stopping)
    CHANGES[change](source, tmp_path)
    if verb == "unpack":
        (tmp_path / "p").rename(tmp_path / "old")
        folder = given()
    with pytest.raises(
        ValueError, match=r"'.*out\.partial.*delete that folder, or pass resume=False, to start over"
    ):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(folder, tmp_path / "out", resume=False)
    if verb == "pack":
        gk.codec.unpack(tmp_path / "out", tmp_path / "again")
    assert contents(tmp_path / ("again" if verb == "pack" else "out")) == contents(source)


def test_another_job_is_refused(source, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        gk.codec.pack(source, tmp_path / "p", progress=stopping)
    before = contents(tmp_path / "p.partial")
    with pytest.raises(ValueError, match="unfinished work of another call .options symbols differs.; delete"):
        gk.codec.pack(source, tmp_path / "p", symbols="high-byte")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="version differs"):
        patch.setattr("gaugekit.codec.files.container.BUNDLED", 3)
        gk.codec.pack(source, tmp_path / "p")
    assert contents(tmp_path / "p.partial") == before
    gk.codec.pack(source, tmp_path / "p", symbols="high-byte", resume=False)
    gk.codec.unpack(tmp_path / "p", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)


def test_other_files_are_those_of_now(source, tmp_path, monkeypatch):
    """What changes between a kill and the next call is in the result as it is then."""
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        gk.codec.pack(source, tmp_path / "p")
    monkeypatch.setattr(os, "rename", rename)
    assert (tmp_path / "p.partial" / "sub" / "notes.txt").is_file()
    (source / "sub" / "notes.txt").write_text("more")
    (source / "config.json").rename(source / "sub" / "config.json")
    (source / "new").mkdir()
    assert gk.codec.pack(source, tmp_path / "p", verify=True)["verified"]
    gk.codec.unpack(tmp_path / "p", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source) and (tmp_path / "again" / "new").is_dir()


def test_verify_compares_copies(source, tmp_path, monkeypatch):
    copy = job.copy
    monkeypatch.setattr(job, "copy", lambda a, b: (copy(a, b), b.write_bytes(b"{}")))
    with pytest.raises(gk.codec.CorruptFile, match="notes.txt: its copy is not what it is"):
        gk.codec.pack(source, tmp_path / "p", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_killed_between_the_rename_and_the_end(source, tmp_path, monkeypatch):
    rename = os.rename

    def killed(*paths):
        rename(*paths)
        raise Stop

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(Stop):
        gk.codec.pack(source, tmp_path / "p")
    monkeypatch.undo()
    assert (tmp_path / "p" / MANIFEST).is_file() and (tmp_path / "p" / "config.json").is_file()
    with pytest.raises(ValueError, match="new or empty directory"):
        gk.codec.pack(source, tmp_path / "p", symbols="high-byte")
    (source / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="new or empty directory"):
        gk.codec.pack(source, tmp_path / "p")
    (source / "config.json").write_text('{"model_type": "none"}')
    report = gk.codec.pack(source, tmp_path / "p")
    assert report["bytes_before"] == sum(p.stat().st_size for p in source.glob("*.safetensors"))
    assert not {MANIFEST, LOCK} & set(contents(tmp_path / "p"))
    gk.codec.unpack(tmp_path / "p", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)


def test_damage_leaves_nothing_and_names_the_file(source, tmp_path):
    gk.codec.pack(source, tmp_path / "p")
    path = tmp_path / "p" / "model-00003-of-00004.safetensors"
    data = bytearray(path.read_bytes())
    data[-300] ^= 1
    path.write_bytes(data)
    with pytest.raises(gk.codec.CorruptFile, match=r"model-00003-of-00004\.safetensors: tensor 'layer.3"):
        gk.codec.unpack(tmp_path / "p", tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "p"]


@pytest.mark.parametrize("whole", [True, False])
def test_verify_publishes_nothing_that_does_not_restore_the_source(source, tmp_path, monkeypatch, whole):
    encode = stream.encode_bytes

    def flipped(data, *rest, **more):
        data[100] ^= 4  # a bit of memory lost before it was coded: every checksum is right
        return encode(data, *rest, **more)

    monkeypatch.setattr(stream, "encode_bytes", flipped)
    given = source if whole else source / "model-00001-of-00004.safetensors"
    with pytest.raises(gk.codec.CorruptFile, match="does not restore it"):
        gk.codec.pack(given, tmp_path / "p", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("count", [1, 1 << 19, (1 << 20) + 1, 3 << 19, (1 << 21) + (1 << 19), (5 << 19) + 7])
@pytest.mark.parametrize("symbols", ["exponent", "exponent-and-mantissa"])
def test_pieces_make_the_blob_that_the_whole_makes(tmp_path, count, symbols):
    tensor = (torch.randn(count) * 0.02).bfloat16()
    assert cuts(count, 1 << 20)[-1][1] == count
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    gk.codec.pack(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", symbols=symbols, memory_bytes=64 << 20
    )
    with gk.codec.safe_open(tmp_path / "b.safetensors") as file:
        size = file.stored_bytes("w")
        assert torch.equal(file.get_tensor("w"), tensor)
    blob = gk.codec.encode(tensor, symbols=symbols)
    if count > 1:
        assert size == len(blob) and (tmp_path / "b.safetensors").read_bytes()[-size:] == blob


def test_memory_bytes_is_checked(source, tmp_path):
    for wrong in (1000, 2.5e9, None):
        with pytest.raises(ValueError, match="memory_bytes: expected 67,108,864"):
            gk.codec.pack(source, tmp_path / "p", memory_bytes=wrong)


CAPPED = """
import re, resource, sys, torch, gaugekit as gk
source, folder = sys.argv[1:]
def data():
    return int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) << 10
gk.codec.decode(gk.codec.encode(torch.zeros(1000)))
cap = data() + (64 << 20) + (20 << 20)  # the buffers, and the stacks of two threads
resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
gk.codec.pack(source, folder + "/p", memory_bytes=64 << 20, verify=True)
gk.codec.unpack(folder + "/p", folder + "/r", memory_bytes=64 << 20)
with gk.codec.safe_open(folder + "/p") as file:
    assert file.get_slice("w")[100:200].shape == (100, 1 << 10)
try:
    torch.empty(90 << 20, dtype=torch.uint8)
except RuntimeError:
    print("capped")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap and /proc are Linux's")
def test_memory_stays_within_the_cap(tmp_path):
    """A tensor of 160 MB is packed, verified, restored and sliced by a process that may not grow by 90 MiB."""
    row = (torch.randn(1 << 10, 1 << 10) * 0.02).bfloat16()
    save_file({"w": row.repeat(80, 1)}, tmp_path / "a.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", CAPPED, tmp_path / "a.safetensors", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "capped\n"
    assert (tmp_path / "r").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_kills_at_random_points(tmp_path):
    """SIGKILL at seeded moments; tests/codec/kills.py does the same to a directory of any size."""
    sharded(tmp_path / "big", shards=6, rows=800)
    script = Path(__file__).with_name("kills.py")
    command = [*python(), "-W", "ignore", script, tmp_path / "big", tmp_path / "out", "8", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 kills")
