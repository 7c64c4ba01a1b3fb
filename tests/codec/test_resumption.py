"""A directory's job that was ended goes on behind its last whole file; another job takes nothing over."""

import os
import signal
import subprocess

import pytest
import torch
from safetensors.torch import save_file

import gaugekit as gk
from warm import python

VERBS = {"pack": gk.codec.pack, "unpack": gk.codec.unpack}
NAMES = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
KILLED = """
import os, signal, sys, gaugekit as gk
verb, source, target = sys.argv[1:]
def kill(done, total):
    if done > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)
getattr(gk.codec, verb)(source, target, progress=kill)
"""


class Stop(BaseException):
    """Ends a call in the middle."""


def killed(verb, source, target):
    """The process ends without any warning: no exception, no finally."""
    command = [*python(), "-W", "ignore", "-c", KILLED, verb, source, target]
    assert subprocess.run([*map(str, command)], capture_output=True).returncode == -signal.SIGKILL


def stopped(verb, source, target):
    def stop(done, total):
        if done > 0.6 * total:
            raise Stop

    with pytest.raises(Stop):
        VERBS[verb](source, target, progress=stop)


def run_anew(run, source, target, **options):
    """What a job of its own does in a place where another was ended: it starts over, or is refused until told to."""
    try:
        return run(source, target, **options)
    except (ValueError, gk.codec.CorruptFile):
        assert not target.exists()
        return run(source, target, **{**options, "resume": False})


@pytest.fixture
def sources(tmp_path):
    """{verb: what it takes}: four shards of the same size, and the same packed."""
    plain = tmp_path / "sources" / "plain"
    plain.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(number)
        weight = (torch.randn(300, 500, generator=generator) * 0.02).bfloat16()
        save_file({"weight": weight}, plain / name, {"format": "pt"})
    (plain / "config.json").write_text("{}")
    gk.codec.pack(plain, tmp_path / "sources" / "packed")
    return {"pack": plain, "unpack": tmp_path / "sources" / "packed"}


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def writings(folder):
    """Which writing of each shard stands anywhere in ``folder``: a file that is written again is another."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        if path.name in NAMES:
            stat = path.stat()
            found[path.name] = (stat.st_ino, stat.st_mtime_ns)
    return found


@pytest.mark.parametrize("end", [killed, stopped])
@pytest.mark.parametrize("verb", VERBS)
def test_what_was_done_is_not_done_again(verb, end, sources, tmp_path):
    work = tmp_path / "work"
    end(verb, sources[verb], work / "out")
    assert not (work / "out").exists()
    before = writings(work)
    assert sorted(before) == NAMES[:2]  # ended in the third of four
    report = VERBS[verb](sources[verb], work / "out")
    after = writings(work)
    assert sorted(after) == NAMES and {name: after[name] for name in before} == before
    expected = VERBS[verb](sources[verb], tmp_path / "whole")
    assert contents(work / "out") == contents(tmp_path / "whole")
    assert {**report.fields, "seconds": 0} == {**expected.fields, "seconds": 0}
    assert [path.name for path in work.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "verb, options",
    [
        ("pack", {"resume": False}),
        ("unpack", {"resume": False}),
        ("pack", {"symbols": "exponent-and-mantissa"}),
    ],
)
def test_another_job_does_all_of_its_work(verb, options, sources, tmp_path):
    """Asked to start over, or with other symbols: no file of the job that was ended is taken over."""
    work = tmp_path / "work"
    stopped(verb, sources[verb], work / "out")
    before = writings(work)
    assert sorted(before) == NAMES[:2]
    run_anew(VERBS[verb], sources[verb], work / "out", **options)
    after = writings(work)
    assert sorted(after) == NAMES and not set(before.items()) & set(after.items())
    VERBS[verb](sources[verb], tmp_path / "whole", **options)
    assert contents(work / "out") == contents(tmp_path / "whole")


def test_another_verb_in_the_same_place_does_all_of_its_work(sources, tmp_path):
    work = tmp_path / "work"
    stopped("pack", sources["pack"], work / "out")
    run_anew(gk.codec.unpack, sources["unpack"], work / "out")
    assert contents(work / "out") == contents(sources["pack"])


def test_another_source_is_not_mixed_with_the_first(sources, tmp_path):
    """A source of the same names and sizes is told apart."""
    work, other = tmp_path / "work", tmp_path / "sources" / "other"
    other.mkdir()
    for name in NAMES:
        save_file({"weight": torch.full((300, 500), 0.5).bfloat16()}, other / name, {"format": "pt"})
    (other / "config.json").write_text("{}")
    stopped("pack", sources["pack"], work / "out")
    run_anew(gk.codec.pack, other, work / "out")
    gk.codec.unpack(work / "out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(other)


def test_proof_covers_what_an_ended_call_wrote_without(sources, tmp_path):
    """A bit of a finished shard is lost before the call that goes on, with ``verify``."""
    work = tmp_path / "work"
    stopped("pack", sources["pack"], work / "out")
    (shard,) = work.rglob(NAMES[0])
    times, data = shard.stat(), bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run_anew(gk.codec.pack, sources["pack"], work / "out", verify=True)["verified"] is True
    gk.codec.unpack(work / "out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(sources["pack"])
