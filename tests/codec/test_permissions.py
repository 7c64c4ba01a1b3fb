"""Folders and files that bind a user: found out before any work, kept in what is written, set last."""

import os
import stat

import pytest

import gaugekit as gk
from gaugekit.files import durable, places, staging
from gaugekit.files.staging import Staging
from helpers import contents


def as_another_user(act):
    """Runs ``act()`` as a user whom permissions bind; root is not. What it raises is raised here."""
    if os.getuid():
        return act()
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            act()
            os.write(writer, b"-")
        except BaseException as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(process, 0)
    if said != "-":
        raise ValueError(said)


@pytest.fixture
def anyone(tmp_path):
    """A folder in which anyone may work."""
    for path in (tmp_path, *tmp_path.parents[:3]):
        if path.stat().st_uid == os.getuid() and len(path.parts) > 2:
            path.chmod(0o777)
    return tmp_path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="changes the user in a fork")
def test_folders_that_cannot_be_written_in_are_found_out_before(source, anyone):
    closed = anyone / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    for target in (closed / "out", closed / "deep" / "out"):
        with pytest.raises(ValueError, match=r"expected a folder that can be written in, got '.*closed'"):
            as_another_user(lambda t=target: staging.check_target(source, t))
    (source / "model.safetensors").chmod(0o644)  # safetensors makes it private
    (source / "secret").write_text("x")
    (source / "secret").chmod(0)
    with pytest.raises(ValueError, match="secret' cannot be read"):
        as_another_user(lambda: places.listing(source))
    (source / "secret").chmod(0o644)
    (source / "sub").chmod(0o300)
    with pytest.raises(ValueError, match="the folder '.*sub' cannot be read"):
        as_another_user(lambda: places.listing(source))
    (source / "sub").chmod(0o755)
    (closed / "mine").mkdir()
    (closed / "mine").chmod(0o777)

    def work():
        staging.check_target(source, closed / "mine")
        staged = Staging(closed / "mine", {"verb": "test"}, {})
        staged.save()
        durable.write(staged.folder / "file", b"whole")
        staged.publish()
        staged.close()

    as_another_user(work)
    assert contents(closed / "mine") == {"file": b"whole"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="changes the user in a fork")
def test_permissions_of_folders_are_set_last(source, anyone):
    modes = {".": 0o555, "sub": 0o500, "sub/empty": 0o555}

    def work(kill):
        staged = Staging(anyone / "out", {"verb": "test"}, {})
        if not staged.published:
            staged.clean(set())
            staged.save()
            (staged.folder / "sub" / "empty").mkdir(parents=True)
            durable.copy(source / "config.json", staged.folder / "sub" / "config.json")
        if kill:
            os.unlink = None  # what comes after the folders within
        staged.publish(modes)
        staged.close()

    with pytest.raises((ValueError, TypeError), match="not callable"):
        unlink = os.unlink
        try:
            as_another_user(lambda: work(True))
        finally:
            os.unlink = unlink
    assert stat.S_IMODE((anyone / "out" / "sub").stat().st_mode) == 0o500
    as_another_user(lambda: work(False))
    assert {n: stat.S_IMODE((anyone / "out" / n).stat().st_mode) for n in modes} == modes
    assert contents(anyone / "out").keys() == {"sub", "sub/empty", "sub/config.json"}


def test_modes_follow_the_source(source, tmp_path):
    wanted = {"sub/empty": 0o555, "sub": 0o555, "config.json": 0o444, "model.safetensors": 0o400, ".": 0o555}
    for name, mode in wanted.items():
        (source / name).chmod(mode)
    for verb, given, target in ((gk.codec.pack, "m", "p"), (gk.codec.unpack, "p", "again")):
        verb(tmp_path / given, tmp_path / target)
        for name, mode in wanted.items():
            assert stat.S_IMODE((tmp_path / target / name).stat().st_mode) == mode
    for folder in ("m", "p", "again"):
        for name in ("sub/empty", "sub", "."):
            (tmp_path / folder / name).chmod(0o755)
