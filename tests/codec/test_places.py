"""Where results may go and what sources may hold: refused by name before any work, or done whole."""

import errno
import os
import shutil
import socket
import sys

import pytest
import torch
from safetensors.torch import save_file

import gaugekit as gk
from gaugekit.files import places, staging
from gaugekit.files.staging import LOCK, MANIFEST
from helpers import contents

WEIGHT = (torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()


def refused(verb, *arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        verb(*arguments)
    assert len(str(caught.value).splitlines()) == 1


def save(source, target):
    gk.codec.save_file({"w": WEIGHT}, target)


def fifo(path):
    os.mkfifo(path)


def bound(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may be no longer than about a hundred bytes
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(path.name)
    os.chdir(here)


ODD = {
    "a fifo": fifo,
    "a socket": bound,
    "a link to a file": lambda path: (path.with_name("file").write_text("mine"), path.symlink_to("file")),
    "a link to a folder": lambda path: (path.with_name("empty").mkdir(), path.symlink_to("empty")),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to(os.devnull),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_target_that_is_neither_file_nor_folder_is_refused(source, tmp_path, kind):
    folder = tmp_path / "d"
    folder.mkdir()
    ODD[kind](folder / "target")
    before = {path.name: os.lstat(path) for path in folder.iterdir()}
    gk.codec.pack(source, tmp_path / "p")
    file = source / "model.safetensors"
    for verb, given in (
        (gk.codec.pack, file),
        (gk.codec.pack, source),
        (gk.codec.unpack, tmp_path / "p" / "model.safetensors"),
        (gk.codec.unpack, tmp_path / "p"),
        (save, None),
        (staging.check_target, source),
    ):
        refused(
            verb,
            given,
            folder / "target",
            match="target: expected a new name, a file or a folder, got .*which is",
        )
    after = {path.name: os.lstat(path) for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert all(
        after[n].st_ino == s.st_ino and after[n].st_mtime_ns == s.st_mtime_ns for n, s in before.items()
    )


def test_devices_are_refused(source):
    for device in (os.devnull, "/dev/stdout", "/dev/fd/1"):
        before = os.lstat(device)
        refused(gk.codec.pack, source / "model.safetensors", device, match="target: expected a new name")
        assert os.lstat(device).st_mode == before.st_mode


def test_names_that_mean_a_folder_are_no_file(source, tmp_path, monkeypatch):
    file = source / "model.safetensors"
    monkeypatch.chdir(tmp_path)
    for target in (f"{tmp_path}/new/", ".", "", "m/..", f"{source}/sub"):
        for verb in (gk.codec.pack, save):
            refused(verb, file, target, match="expected a file name, got the directory")
    (tmp_path / "plain").write_text("mine")
    for target in ("plain/new", "plain/deep/new", "plain/."):
        for given in (file, source):
            with pytest.raises(
                ValueError, match=r"in a folder, but .*plain' is none|plain/?\.?', which is not|file name"
            ):
                if target == "plain/." and given is file:
                    gk.codec.pack(file, "plain/./")
                gk.codec.pack(given, target)
    assert (tmp_path / "plain").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "plain"]


def test_a_link_as_source_and_links_among_the_folders_are_followed(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "real").mkdir()
    (tmp_path / "to real").symlink_to("real")
    gk.codec.pack(tmp_path / "link", tmp_path / "to real" / "p")
    gk.codec.unpack(tmp_path / "real" / "p", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)
    refused(gk.codec.pack, tmp_path / "link", source / "sub" / "out", match="beside the source")


def test_work_in_progress_never_meets_the_source(source, tmp_path):
    """The names under which results grow may be those of sources, or of links and files of somebody else."""
    held = tmp_path / "out.partial"
    source.rename(held)
    before = contents(held)
    refused(gk.codec.pack, held, tmp_path / "out", match="beside the source")
    refused(gk.codec.pack, held / "sub", tmp_path / "out", match="beside the source")
    sibling = places.beside(tmp_path / "file", ".", ".gaugekit-partial")
    os.link(held / "model.safetensors", sibling)
    refused(gk.codec.pack, sibling, tmp_path / "file", match="it is taken")
    refused(gk.codec.pack, held / "model.safetensors", tmp_path / "file", match="it is taken")
    sibling.unlink()
    sibling.symlink_to(held / "model.safetensors")
    refused(save, None, tmp_path / "file", match="it is taken")
    sibling.unlink()
    os.mkfifo(sibling)
    refused(save, None, tmp_path / "file", match="it is taken")
    assert contents(held) == before
    held.rename(source)
    held.symlink_to(source)
    refused(gk.codec.pack, source, tmp_path / "out", match="beside the source|it is taken")
    held.unlink()
    held.write_text("mine")
    refused(gk.codec.pack, source, tmp_path / "out", match="it is taken")
    assert contents(source) == before


@pytest.mark.parametrize("name", [MANIFEST, LOCK])
def test_unfinished_work_is_no_source(source, tmp_path, name):
    (source / name).write_text("{}")
    refused(gk.codec.pack, source, tmp_path / "out", match=f"source: expected finished work, .* holds {name}")


def test_everything_in_a_folder_comes_along(source, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "vocab.txt").write_text("a")
    (source / "linked").symlink_to(tmp_path / "blobs")
    (source / "twice").symlink_to("linked/vocab.txt")
    name = os.fsdecode(b"caf\xe9.txt")
    (source / name).write_text("no UTF-8")
    (source / os.fsdecode(b"\xff.safetensors")).write_bytes((source / "model.safetensors").read_bytes())
    gk.codec.pack(source, tmp_path / "p", verify=True)
    gk.codec.unpack(tmp_path / "p", tmp_path / "again")
    expected = {**contents(source), "linked": "folder", "linked/vocab.txt": b"a"}
    assert contents(tmp_path / "again") == expected and "sub/empty" in expected
    assert not any(path.is_symlink() for path in (tmp_path / "again").rglob("*"))


LOST = {
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link to nothing"),
    "a shard that is one": (
        lambda path: path.with_name("model-2.safetensors").symlink_to("nowhere"),
        r"model-2.safetensors' is a link to nothing",
    ),
    "a link to the folder above": (lambda path: path.symlink_to(".."), "back to a folder that it is in"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "is a link to nothing that can be read"),
    "a fifo": (fifo, "is neither a file nor a folder"),
    "a socket": (bound, "is neither a file nor a folder"),
    "a device": (lambda path: path.symlink_to(os.devnull), "is neither a file nor a folder"),
}


@pytest.mark.parametrize("kind", LOST)
def test_what_would_be_lost_is_named(source, tmp_path, kind):
    make, message = LOST[kind]
    make(source / "sub" / "odd")
    refused(gk.codec.pack, source, tmp_path / "out", match=message)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_target_in_a_folder_that_the_source_links_to_is_refused(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    refused(gk.codec.pack, source, tmp_path / "elsewhere" / "out", match="beside the source")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_long_names(source, tmp_path):
    for name in ("n" * 255, "名" * 85, "n" * 244):
        gk.codec.pack(source, tmp_path / name)
        gk.codec.unpack(tmp_path / name / "model.safetensors", tmp_path / f"f{name[1:]}")
        assert (tmp_path / f"f{name[1:]}").read_bytes() == (source / "model.safetensors").read_bytes()
        partial = places.beside(tmp_path / name, "", ".partial")
        assert partial != tmp_path / name and len(os.fsencode(partial.name)) <= 255
    refused(gk.codec.pack, source, tmp_path / ("n" * 256), match="target: File name too long")
    refused(
        gk.codec.pack,
        source / "model.safetensors",
        tmp_path / ("n" * 256),
        match="target: File name too long",
    )


@pytest.mark.parametrize("fixed", ["a mount", "the current folder"])
def test_an_empty_folder_that_cannot_be_replaced_is_worked_in(source, tmp_path, monkeypatch, fixed):
    target = tmp_path / "out"
    target.mkdir()
    number = target.stat().st_ino
    if fixed == "a mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(target))
    else:
        monkeypatch.chdir(target)

    class Stop(BaseException):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        gk.codec.pack(source, target if fixed == "a mount" else ".", progress=stop)
    assert (target / MANIFEST).is_file() and not (target / "config.json").exists()
    refused(gk.codec.unpack, target, tmp_path / "x", match="source: expected finished work")
    gk.codec.pack(source, target)
    assert target.stat().st_ino == number and {p.name for p in tmp_path.iterdir()} == {"m", "out"}
    gk.codec.unpack(target, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)
    damaged = tmp_path / "damaged"
    shutil.copytree(target, damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    shutil.rmtree(tmp_path / "again")
    shutil.rmtree(target) if fixed == "a mount" else [
        shutil.rmtree(p) if p.is_dir() else p.unlink() for p in target.iterdir()
    ]
    target.mkdir(exist_ok=True)
    with pytest.raises(gk.codec.CorruptFile):
        gk.codec.unpack(damaged, target)
    assert target.is_dir() and not list(target.iterdir())


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the limit on a file's size is raised as EFBIG"
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_write_that_fails_names_its_file_and_leaves_what_goes_on(source, tmp_path, whole):
    import resource

    save_file({"noise": torch.randint(0, 255, (300_000,), dtype=torch.uint8)}, source / "z.safetensors")
    given = source if whole else source / "z.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*(z.safetensors|out)'"):
            gk.codec.pack(given, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["m", "out.partial"] if whole else ["m"])
    assert not list(tmp_path.rglob("*.gaugekit-partial"))
    gk.codec.pack(given, tmp_path / "out")
    gk.codec.unpack(tmp_path / "out", tmp_path / "again")
    again = (tmp_path / "again" / "z.safetensors") if whole else tmp_path / "again"
    assert again.read_bytes() == (source / "z.safetensors").read_bytes()


@pytest.mark.parametrize("verb", ["pack", "unpack", "load"])
def test_a_read_that_fails_names_its_file(source, tmp_path, monkeypatch, verb):
    gk.codec.pack(source / "model.safetensors", tmp_path / "p")

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    given = source / "model.safetensors" if verb == "pack" else tmp_path / "p"
    with pytest.raises(OSError, match=f"Input/output error: '{given}'"):
        gk.codec.load_file(given) if verb == "load" else getattr(gk.codec, verb)(given, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "p"]


def test_a_source_that_is_neither_file_nor_folder_is_refused(tmp_path):
    fifo(tmp_path / "fifo")
    for given in (tmp_path / "fifo", os.devnull):
        refused(
            gk.codec.pack,
            given,
            tmp_path / "out",
            match="source: expected a .safetensors file or a directory",
        )
