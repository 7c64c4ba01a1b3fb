"""KVStore: bounded, durable, many threads at once; a damaged block is reported once and then absent."""

import os
import random
import signal
import threading
import time

import pytest
import torch

from gaugekit.codec import CorruptFile, KVStore, KVTables
from gaugekit.codec.kv.block import key_digest
from gaugekit.codec.kv.directory import BLOCK
from gaugekit.files import durable
from kv_blocks import same


def files(folder) -> list:
    return sorted(path for path in folder.iterdir() if BLOCK.fullmatch(path.name))


@pytest.mark.parametrize("on_disk", [False, True])
def test_blocks_come_back_and_are_replaced(on_disk, tmp_path, blocks):
    with KVStore(tmp_path / "s" if on_disk else None) as store:
        assert store.get("a") is None and "a" not in store and not store.remove("a")
        size = store.put("a", blocks[0])
        assert size < 0.75 * blocks[0].nbytes
        store.put(b"b", blocks[1])
        assert same(store.get("a"), blocks[0]) and same(store.get("b"), blocks[1])  # a string is its UTF-8
        store.put("a", blocks[2])
        out = torch.empty_like(blocks[0])
        assert store.get("a", out) is out and same(out, blocks[2])
        assert len(store) == 2 and "a" in store
        assert store.remove("a") and store.get("a") is None
        stats = store.stats()
        assert (stats.hits, stats.misses, stats.damaged, stats.evicted) == (3, 2, 0, 0)
        assert stats.plain_bytes == 3 * blocks[0].nbytes and stats.coded_bytes < stats.plain_bytes
        store.clear()
        assert len(store) == 0 and store.get("b") is None and store.stats().memory_bytes == 0


def test_the_first_block_that_tells_enough_calibrates(tmp_path, blocks):
    with KVStore(tmp_path) as store:
        store.put("short", blocks[0][:, :, :15].contiguous())
        assert store.tables is None
        store.put("long", blocks[1])
        assert store.tables.digest == KVTables.calibrate(blocks[1]).digest
    with KVStore(tmp_path) as store:  # and they stay
        store.put("other", blocks[2])
        assert store.tables.digest == KVTables.calibrate(blocks[1]).digest
        for key, block in (("short", blocks[0][:, :, :15]), ("long", blocks[1]), ("other", blocks[2])):
            assert same(store.get(key), block.contiguous())
    with pytest.raises(ValueError, match="tables: expected those that"):
        KVStore(tmp_path, tables=KVTables.calibrate(blocks[3]))
    with KVStore(tables=False) as store:
        store.put("a", blocks[0])
        assert store.tables is None


def test_a_store_opened_again_has_what_was_put_but_the_oldest_where_room_is_less(tmp_path, blocks):
    with KVStore(tmp_path) as store:
        sizes = []
        for number, block in enumerate(blocks):
            sizes.append(store.put(str(number), block))
            os.utime(files(tmp_path)[0])  # whatever the clock's steps
        for number in range(4):
            os.utime(store._directory.path(key_digest(str(number))), ns=(number, number))
    (tmp_path / "notes.txt").write_text("not ours")
    with KVStore(tmp_path, disk_bytes=sizes[2] + sizes[3]) as store:
        assert [str(number) in store for number in range(4)] == [False, False, True, True]
        assert len(files(tmp_path)) == 2 and (tmp_path / "notes.txt").exists()
        assert store.stats().memory_blocks == 0
        assert same(store.get("3"), blocks[3]) and store.stats().memory_blocks == 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_bounds_hold_and_the_least_recently_used_go(on_disk, tmp_path, blocks):
    size = KVStore(tables=False).put("a", blocks[0])
    room = {"disk_bytes" if on_disk else "memory_bytes": 2 * size + size // 2}
    with KVStore(tmp_path if on_disk else None, tables=False, **room) as store:
        store.put("a", blocks[0])
        store.put("b", blocks[1])
        assert store.get("a") is not None
        store.put("c", blocks[2])
        assert [key in store for key in "abc"] == [True, False, True]
        assert store.stats().evicted == 1
        stats = store.stats()
        assert (stats.disk_bytes if on_disk else stats.memory_bytes) <= 2 * size + size // 2
        if on_disk:
            assert sum(path.stat().st_size for path in files(tmp_path)) == stats.disk_bytes
        with pytest.raises(ValueError, match="block: expected at most"):
            store.put("d", torch.cat([blocks[3]] * 4, dim=2))
        assert same(store.get("a"), blocks[0])


def test_memory_holds_what_was_used_last_and_the_disk_everything(tmp_path, blocks):
    size = KVStore(tables=False).put("a", blocks[0])
    with KVStore(tmp_path, tables=False, memory_bytes=size + size // 2) as store:
        for number, block in enumerate(blocks):
            store.put(str(number), block)
        assert store.stats().memory_blocks == 1 and store.stats().disk_blocks == 4
        for number, block in enumerate(blocks):
            assert same(store.get(str(number)), block)
        assert store.stats().evicted == 0
    with KVStore(tmp_path, tables=False, memory_bytes=0) as store:
        assert same(store.get("0"), blocks[0]) and store.stats().memory_blocks == 0


def test_a_damaged_file_is_reported_once_and_then_absent(tmp_path, blocks):
    with KVStore(tmp_path, memory_bytes=0) as store:
        store.put("a", blocks[0])
        store.put("b", blocks[1])
        path, other = (store._directory.path(key_digest(key)) for key in "ab")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptFile, match=str(path)):
            store.get("a")
        assert store.get("a") is None and not path.exists() and store.stats().damaged == 1
        store.put("a", blocks[0])
        assert same(store.get("a"), blocks[0])
        path.write_bytes(other.read_bytes())  # a sound block, but another one
        with pytest.raises(CorruptFile, match="another key"):
            store.get("a")
        path.write_bytes(b"")
        other.unlink()
        assert store.get("b") is None and "b" not in store


def test_damaged_memory_is_replaced_from_the_disk_or_reported(tmp_path, blocks):
    for folder in (tmp_path, None):
        with KVStore(folder) as store:
            store.put("a", blocks[0])
            store._blocks[key_digest("a")][200] ^= 1
            if folder:
                assert same(store.get("a"), blocks[0])
            else:
                with pytest.raises(CorruptFile, match="'a' in memory"):
                    store.get("a")
                assert store.get("a") is None
            assert store.stats().damaged == 1


def test_damaged_tables_are_reported_when_the_store_is_opened(tmp_path, blocks):
    with KVStore(tmp_path) as store:
        store.put("a", blocks[0])
    data = bytearray((tmp_path / "tables.kvt").read_bytes())
    data[-1] ^= 1
    (tmp_path / "tables.kvt").write_bytes(data)
    with pytest.raises(CorruptFile, match="tables.kvt"):
        KVStore(tmp_path)


def test_a_directory_has_one_owner(tmp_path):
    with KVStore(tmp_path), pytest.raises(ValueError, match="another process keeps its blocks"):
        KVStore(tmp_path)
    KVStore(tmp_path).close()


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_closed_store_says_so(on_disk, tmp_path, blocks):
    store = KVStore(tmp_path if on_disk else None)
    store.put("a", blocks[0])
    store.close()
    store.close()
    for call in (lambda: store.get("a"), lambda: store.put("a", blocks[0]), lambda: store.remove("a")):
        with pytest.raises(ValueError, match="store: expected an open one"):
            call()
    store.clear()
    assert len(files(tmp_path)) == on_disk


def test_a_full_disk_leaves_what_was_there(tmp_path, blocks, monkeypatch):
    with KVStore(tmp_path, memory_bytes=0) as store:
        store.put("a", blocks[0])

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        for key in "ab":
            with pytest.raises(OSError, match="No space left"):
                store.put(key, blocks[1])
        monkeypatch.undo()
        assert same(store.get("a"), blocks[0]) and "b" not in store
        assert store.stats().disk_blocks == 1 and store._disk.reserved_bytes == 0
        assert not list(tmp_path.glob(".*partial"))
        store.put("b", blocks[1])
        assert same(store.get("b"), blocks[1])


def test_what_was_read_before_a_block_was_replaced_is_not_kept(tmp_path, blocks, monkeypatch):
    size = KVStore(tables=False).put("a", blocks[0])
    with KVStore(tmp_path, tables=False, memory_bytes=size + size // 2) as store:
        store.put("a", blocks[0])
        store.put("b", blocks[1])  # memory lets go of "a"
        read = store._directory.read

        def slowly(name):
            data = read(name)
            monkeypatch.undo()
            store.put("a", blocks[2])
            store.put("b", blocks[1])
            return data

        monkeypatch.setattr(store._directory, "read", slowly)
        assert same(store.get("a"), blocks[0])  # it was there when the call began
        assert same(store.get("a"), blocks[2]) and not store._reading


@pytest.mark.parametrize(
    "other",
    [lambda b: b[:, :1], lambda b: b[:1], lambda b: b.half(), lambda b: b.float(), lambda b: b[..., :1]],
)
def test_a_block_of_another_kind_than_those_before_is_refused_when_it_is_put(other, blocks):
    """And the other way round: what broadcasts to the shape of the tables is not of that shape."""
    for first, second in ((blocks[0], other(blocks[0])), (other(blocks[0]), blocks[0])):
        store = KVStore()
        store.put("a", first)
        with pytest.raises(ValueError, match="block: expected torch.* as in the tables, got torch"):
            store.put("b", second)
        assert "b" not in store and same(store.get("a"), first.contiguous())


def test_after_a_failed_flush_of_the_folder_a_store_knows_what_lies_there(tmp_path, blocks, monkeypatch):
    def fail(path):
        raise OSError(5, "the folder is not flushed")

    with KVStore(tmp_path, tables=False) as store:
        store.put("a", blocks[0])
        with monkeypatch.context() as patch:
            patch.setattr(durable, "sync", fail)
            for key in "ab":
                with pytest.raises(OSError, match="not flushed"):
                    store.put(key, blocks[1])
        now = [store.get(key) for key in "ab"]
        assert store.stats().disk_bytes == sum(path.stat().st_size for path in files(tmp_path))
    with KVStore(tmp_path, tables=False) as store:
        assert all(same(store.get(key), block) for key, block in zip("ab", now, strict=True))


@pytest.mark.parametrize("on_disk", [False, True])
def test_threads_put_get_and_remove_at_once(on_disk, tmp_path, blocks):
    """Eight threads in a store with room for three blocks: what is got is whole and of its key, bounds hold."""
    size = KVStore(tables=False).put("a", blocks[0])
    room = {"memory_bytes": 3 * size + size // 2, "disk_bytes": 3 * size + size // 2}
    wrong, keys = [], [str(number) for number in range(6)]
    versions = {key: [blocks[0] * (2 + number), blocks[1] * (2 + number)] for number, key in enumerate(keys)}
    with KVStore(tmp_path if on_disk else None, tables=False, **room) as store:

        def work(seed):
            chance = random.Random(seed)
            try:
                for _ in range(25):
                    key = chance.choice(keys)
                    act = chance.random()
                    if act < 0.4:
                        store.put(key, chance.choice(versions[key]))
                    elif act < 0.95:
                        block = store.get(key)
                        if block is not None and not any(same(block, version) for version in versions[key]):
                            wrong.append(key)
                    else:
                        store.remove(key)
                    stats = store.stats()
                    if max(stats.memory_bytes, stats.disk_bytes) > room["disk_bytes"]:
                        wrong.append(stats)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not wrong and not any(thread.is_alive() for thread in threads)
        if on_disk:
            assert {path.stat().st_size for path in files(tmp_path)} == set(store._disk.sizes.values())
            assert len(files(tmp_path)) == len(store)


def test_a_kill_at_any_point_loses_nothing_that_was_there(tmp_path, blocks, monkeypatch):
    """A process is killed again and again while it puts: before the write, in it, before the rename and after it."""
    with KVStore(tmp_path) as store:
        for number in range(2):
            store.put(str(number), blocks[number])
    points = {
        "write": (os, "fsync"),  # written, not flushed
        "rename": (os, "replace"),
        "folder": (durable, "sync"),  # renamed, the folder not flushed
    }
    for point, (module, name) in points.items():
        process = os.fork()
        if not process:
            setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            with KVStore(tmp_path) as store:
                store.put("1", blocks[2])
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), point
        with KVStore(tmp_path) as store:
            assert not list(tmp_path.glob(".*partial"))
            assert same(store.get("0"), blocks[0])
            expected = blocks[2] if point == "folder" else blocks[1]
            assert same(store.get("1"), expected), point
            store.put("1", blocks[1])


def test_random_kills_leave_whole_blocks(tmp_path, blocks):
    chance = random.Random(0)
    with KVStore(tmp_path) as store:
        store.put("0", blocks[0])
    for _ in range(6):
        process = os.fork()
        if not process:
            torch.set_num_threads(1)
            with KVStore(tmp_path) as store:
                for number in range(10_000):
                    store.put(str(number % 4), blocks[number % 4])
            os._exit(0)
        time.sleep(chance.uniform(0.02, 0.12))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with KVStore(tmp_path) as store:
            assert same(store.get("0"), blocks[0])
            for number in range(1, 4):
                block = store.get(str(number))
                assert block is None or same(block, blocks[number])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: KVStore(memory_bytes=0), "memory_bytes: expected a number of bytes, 1 or more"),
        (lambda p: KVStore(p, disk_bytes=0), "disk_bytes: expected"),
        (lambda p: KVStore(p, memory_bytes=-1), "memory_bytes: expected a number of bytes, 0 or more"),
        (lambda p: KVStore(p, memory_bytes=1.5), "memory_bytes: expected"),
        (lambda p: KVStore(p, axes="XY"), "axes: expected"),
        (lambda p: KVStore(p, tables=True), "tables: expected KVTables, None or False, got True"),
        (lambda p: KVStore(p / "file" / "in"), "directory: expected"),
        (lambda p: KVStore(p / "file"), "directory: expected a folder or a new name"),
        (lambda p: KVStore(""), "directory: expected a name, got an empty one"),
        (lambda p: KVStore(p).put("a", [1]), "block: expected a torch.Tensor"),
        (lambda p: KVStore(p).put("", torch.zeros(1)), "key: expected"),
        (lambda p: KVStore(p).put("a", torch.zeros(1)), "block: expected 4 dimensions"),
    ],
)
def test_bad_input(call, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
