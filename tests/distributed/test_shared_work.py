"""pack, unpack, convert and slice by several ranks: the files of one process, and an end for all where one fails.

Ranks are threads here, which meet in a store as those of torchrun do; where one is killed they are processes.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import HashStore
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import gaugekit as gk
from gaugekit.codec.files.container import CorruptFile
from gaugekit.files.ranks import RankFailed, Ranks, torchrun
from tiny import add_tokenizer
from warm import python


def shared(call, size: int = 2, patience: float = 20.0) -> list:
    """What call(ranks) returns on each rank, or the exception it raised."""
    store, outcomes = HashStore(), [None] * size

    def run(rank: int) -> None:
        try:
            with Ranks(rank, size, store, patience) as ranks:
                outcomes[rank] = call(ranks)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return outcomes


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sharded(path: Path, shards: int = 5) -> Path:
    path.mkdir()
    where = {}
    for shard in range(shards):
        file, name = f"model-{shard}.safetensors", f"layer.{shard}.weight"
        weight = torch.randn(50 + 90 * shard, 300, generator=torch.Generator().manual_seed(shard)) * 0.02
        save_file({name: weight.bfloat16()}, path / file, {"format": "pt"})
        where[name] = file
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (path / "config.json").write_text('{"model_type": "none"}')
    return path


@pytest.fixture
def source(tmp_path):
    return sharded(tmp_path / "source")


@pytest.mark.parametrize("size", [2, 3, 7])
def test_packed_by_several_ranks(source, tmp_path, size):
    alone = gk.codec.pack(source, tmp_path / "one")
    told = []
    reports = shared(lambda ranks: gk.codec.pack(
        source, tmp_path / "many", ranks=ranks, progress=(lambda *now: told.append(now)) if ranks.leads else None,
    ), size)  # fmt: skip
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert told[-1] == (total, total)
    for report in reports:
        assert report.fields | {"seconds": 0} == alone.fields | {"seconds": 0} and report.notes == alone.notes
    shared(lambda ranks: gk.codec.unpack(tmp_path / "many", tmp_path / "back", ranks=ranks), size)
    assert contents(tmp_path / "back") == contents(source)


def test_each_rank_has_its_share(source, tmp_path, monkeypatch):
    """The files are dealt by size, and no two ranks make the same one."""
    from gaugekit.codec import packing

    made, original = [], packing._pack_file

    def counted(path, place, *rest, **options):
        made.append((threading.current_thread().name, path.name))
        return original(path, place, *rest, **options)

    monkeypatch.setattr(packing, "_pack_file", counted)
    shared(lambda ranks: gk.codec.pack(source, tmp_path / "many", ranks=ranks))
    assert sorted(name for _, name in made) == sorted(path.name for path in source.glob("*.safetensors"))
    by_rank = {thread: {name for other, name in made if other == thread} for thread, _ in made}
    assert sorted(map(len, by_rank.values())) == [2, 3]
    assert {f"model-{n}.safetensors" for n in (3, 2)} in by_rank.values()  # 320 + 230 rows; 410 + 140 + 50


def test_a_file_is_one_piece_of_work(source, tmp_path):
    file = source / "model-4.safetensors"
    gk.codec.pack(file, tmp_path / "one.safetensors")
    reports = shared(lambda ranks: gk.codec.pack(file, tmp_path / "many.safetensors", ranks=ranks))
    assert (tmp_path / "many.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert reports[0]["bytes_after"] == reports[1]["bytes_after"]


@pytest.mark.parametrize("damaged", [3, 4])
def test_damage_on_one_rank_ends_all_and_leaves_nothing(source, tmp_path, damaged):
    """Rank 0 has file 4 and rank 1 file 3: both ranks meet it once. An index is checked before, so there is none."""
    (source / "model.safetensors.index.json").unlink()
    path = source / f"model-{damaged}.safetensors"
    gk.codec.pack(path, tmp_path / "file.safetensors")
    blob = bytearray((tmp_path / "file.safetensors").read_bytes())
    shared(lambda ranks: gk.codec.pack(source, tmp_path / "packed", ranks=ranks))
    blob[-100] ^= 1
    (tmp_path / "packed" / path.name).write_bytes(blob)
    before = contents(tmp_path / "packed")
    errors = shared(lambda ranks: gk.codec.unpack(tmp_path / "packed", tmp_path / "back", ranks=ranks))
    assert isinstance(errors[0], CorruptFile) and isinstance(errors[1], CorruptFile | RankFailed)
    assert all(path.name in str(error) for error in errors)
    assert contents(tmp_path / "packed") == before
    assert not list(tmp_path.glob("back*"))


def test_what_is_refused_is_refused_on_every_rank(source, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    errors = shared(lambda ranks: gk.codec.pack(source, tmp_path / "taken", ranks=ranks))
    assert isinstance(errors[0], ValueError) and "expected a new or empty directory" in str(errors[0])
    assert isinstance(errors[1], RankFailed) and "rank 0: target: expected a new or empty" in str(errors[1])
    assert contents(tmp_path / "taken") == {"file": b"mine"}


def late(target: Path, call):
    """call(ranks), the last rank only once ``target`` stands."""

    def called(ranks):
        end = time.monotonic() + 60
        while ranks.rank == ranks.size - 1 and not target.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return call(ranks)

    return called


def test_a_rank_without_a_file_may_come_when_all_is_done(source, tmp_path):
    target = tmp_path / "many"
    reports = shared(late(target, lambda ranks: gk.codec.pack(source, target, ranks=ranks)), 6)
    assert not any(isinstance(report, BaseException) for report in reports), reports
    gk.codec.pack(source, tmp_path / "one")
    assert contents(target) == contents(tmp_path / "one")


def test_every_rank_has_to_see_the_disk(source, tmp_path):
    def call(ranks):
        place = tmp_path / ("here" if ranks.leads else "elsewhere")
        return gk.codec.pack(source, place, ranks=ranks)

    errors = shared(call)
    assert isinstance(errors[1], ValueError) and "expected a disk that all ranks see" in str(errors[1])
    assert isinstance(errors[0], RankFailed)
    assert not (tmp_path / "here").exists() and not (tmp_path / "elsewhere").exists()
    gk.codec.pack(source, tmp_path / "here")  # goes on


def test_a_silent_rank_is_noticed(source, tmp_path):
    """It never comes: rank 0 waits as long as it is told to, and what it made itself is there for the next call."""

    def call(ranks):
        if ranks.leads:
            return gk.codec.pack(source, tmp_path / "packed", ranks=ranks)
        ranks._over.set()  # its heart stops, as a killed process' does
        ranks._heart.join()
        time.sleep(3)

    error = shared(call, patience=0.5)[0]
    assert isinstance(error, RankFailed) and "rank 1: no sign of life" in str(error)
    done = json.loads((tmp_path / "packed.partial" / "gaugekit_manifest.json").read_text())["done"]
    assert {*done} == {f"model-{n}.safetensors" for n in (4, 1, 0)}
    gk.codec.pack(source, tmp_path / "packed")
    gk.codec.pack(source, tmp_path / "again")
    assert contents(tmp_path / "packed") == contents(tmp_path / "again")


def test_ranks_of_torchrun(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's own variable, in a shell that torchrun did not start
    assert torchrun() == (0, 1) and Ranks.of_torchrun() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "3")
    assert torchrun() == (3, 4)


def test_verbs_that_do_not_share_refuse_torchrun(monkeypatch, capsys):
    from gaugekit.cli import main

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 2
    assert (
        "expected one process, got 2 of torchrun: only convert, pack, unpack share" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 90}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path, max_shard_size="100kB")
    return path


@pytest.mark.parametrize("pack", [False, True])
def test_converted_by_several_ranks(llama, tmp_path, pack):
    def convert(target, ranks=None):
        return gk.convert(llama, target, [gk.symmetry.GaugeFix()], dtype="bfloat16", pack=pack, ranks=ranks)

    alone = convert(tmp_path / "one")
    reports = shared(lambda ranks: convert(tmp_path / "many", ranks), 3)
    assert not any(isinstance(report, BaseException) for report in reports), reports
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    for report in reports:
        assert report.fields | {"seconds": 0} == alone.fields | {"seconds": 0}


def test_a_rank_without_a_layer_may_come_when_all_is_done(llama, tmp_path):
    def convert(target, ranks=None):
        return gk.convert(llama, target, [gk.symmetry.GaugeFix()], dtype="bfloat16", pack=True, ranks=ranks)

    reports = shared(late(tmp_path / "many", lambda ranks: convert(tmp_path / "many", ranks)), 8)
    assert not any(isinstance(report, BaseException) for report in reports), reports
    convert(tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=90, n_positions=48)
    GPT2LMHeadModel(config).save_pretrained(path)
    add_tokenizer(path)
    (path.parent / "text.txt").write_text("Every reader learns a little from each of these lines. " * 40)
    return path


def test_a_text_is_read_by_rank_0_alone(gpt2, tmp_path, monkeypatch):
    """What rank 0 found out of it the others read from its folder, ranks by energy among it."""
    from gaugekit.rank import prepare
    from gaugekit.rewrite import Later

    text = gpt2.parent / "text.txt"

    def convert(target, ranks=None):
        later = Later(
            {"energy": 0.9}, lambda folder: [prepare(gpt2, text, energy=0.9, work_directory=folder)]
        )
        return gk.convert(gpt2, target, later, calibration=text, ranks=ranks)

    convert(tmp_path / "1" / "out")
    outcomes = shared(lambda ranks: convert(tmp_path / "2" / "out", ranks), 3)
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes), outcomes
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


def test_sliced_by_two_ranks(gpt2, tmp_path):
    def cut(target, ranks=None):
        return gk.slicing.slice(
            gpt2, target, 0.25, calibration=gpt2.parent / "text.txt", windows=8, window=32, ranks=ranks
        )

    cut(tmp_path / "1" / "out")
    outcomes = shared(lambda ranks: cut(tmp_path / "2" / "out", ranks))
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes), outcomes
    one, two = (contents(tmp_path / name / "out") for name in ("1", "2"))
    assert one.pop("report.html") and two.pop("report.html")  # its figures count on in a process
    assert two == one


def test_an_error_in_a_layer_of_another_rank(llama, tmp_path):
    class Failing(gk.symmetry.GaugeFix):
        def layer(self, view, statistics=None):
            if view.layer == 3:  # of two ranks the other one's
                raise ValueError("layer 3 does not please me")
            return super().layer(view, statistics)

    errors = shared(lambda ranks: gk.convert(llama, tmp_path / "many", [Failing()], ranks=ranks))
    assert all("layer 3 does not please me" in str(error) for error in errors)
    assert isinstance(errors[0], ValueError) and not list(tmp_path.glob("many*"))


def test_a_conversion_that_broke_off_is_finished(llama, tmp_path):
    """As by a disk that fails on one rank: what is there stays, and the same call on other ranks goes on."""

    class Broken(gk.symmetry.GaugeFix):
        def layer(self, view, statistics=None):
            if view.layer == 4:
                raise OSError("the disk is gone")
            return super().layer(view, statistics)

    errors = shared(lambda ranks: gk.convert(llama, tmp_path / "many", [Broken()], ranks=ranks))
    assert all(isinstance(error, OSError) and "the disk is gone" in str(error) for error in errors)
    assert (tmp_path / "many.partial").is_dir() and not (tmp_path / "many").exists()
    shared(lambda ranks: gk.convert(llama, tmp_path / "many", [gk.symmetry.GaugeFix()], ranks=ranks), 3)
    gk.convert(llama, tmp_path / "one", [gk.symmetry.GaugeFix()])
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


KILLED = """
import os, signal, sys, time
from pathlib import Path
from torch.distributed import TCPStore
import gaugekit as gk
from gaugekit.files import ranks as module
from gaugekit.codec import packing
source, target, victim = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
module.BEAT = 0.1
store = TCPStore("localhost", 0, 3, True, wait_for_workers=False)
original = packing._pack_file
def slow(path, place, advance, **options):
    counts = original(path, place, advance, **options)
    if path.name in ("model-1.safetensors", "model-3.safetensors"):  # the second of each rank: the first is whole
        place.unlink(); place.with_name("." + place.name + ".half").write_bytes(b"half")
        time.sleep(60)
    return counts
packing._pack_file = slow
def start(rank):
    process = os.fork()
    if process: return process
    status = 1
    try:
        with module.Ranks(rank, 2, TCPStore("localhost", store.port, 3, False, wait_for_workers=False), 1.0) as ranks:
            gk.codec.pack(source, target, ranks=ranks)
        status = 0
    except OSError as error:
        print(f"rank {rank}: {error}", flush=True)
        status = 3
    finally:
        os._exit(status)
processes = [start(rank) for rank in range(2)]
partial = target.with_name(target.name + ".partial")
while len(list(partial.glob("model-*"))) < 2: time.sleep(0.02)
time.sleep(0.3)
os.kill(processes[victim], signal.SIGKILL)
if victim: os.kill(processes[0], signal.SIGKILL)  # torchrun ends the others
for process in processes:
    if process != processes[victim]: os.kill(process, signal.SIGKILL) if victim == 0 else None
    os.waitpid(process, 0)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_in_the_middle(source, tmp_path, victim):
    """The source is as it was, nothing has the target's name, and the same call makes what one process makes."""
    before = contents(source)
    subprocess.run(
        [*python(), "-c", KILLED, str(source), str(tmp_path / "packed"), str(victim)], check=True, timeout=100
    )
    assert contents(source) == before and not (tmp_path / "packed").exists()
    assert (tmp_path / "packed.partial").is_dir()
    reports = shared(lambda ranks: gk.codec.pack(source, tmp_path / "packed", ranks=ranks))
    assert not any(isinstance(report, BaseException) for report in reports), reports
    gk.codec.pack(source, tmp_path / "one")
    assert contents(tmp_path / "packed") == contents(tmp_path / "one")


@pytest.mark.slow
def test_by_torchrun(source, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "gaugekit", "pack",
               str(source), str(tmp_path / "many"), "--json"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)  # of rank 0, once
    gk.codec.pack(source, tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert report["bytes_after"] == sum(p.stat().st_size for p in (tmp_path / "one").glob("*.safetensors"))
    shutil.rmtree(tmp_path / "many")
