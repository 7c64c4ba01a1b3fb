"""Files that are whole or not there, and what says that two jobs are the same."""

import hashlib
import json
import os
import stat

import pytest

from gaugekit.files.durable import digest_of, identity, lock, replacement, replacing, sha256


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with replacing(path) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["state"]


def test_a_library_that_makes_its_file_private_does_not_make_ours_so(tmp_path):
    path, other = tmp_path / "weights", tmp_path / "other"
    other.touch()
    with replacement(path) as place:
        place.unlink()
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o600))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_an_identity_is_that_of_weights_text_and_options(tmp_path):
    file = tmp_path / "w"
    file.write_bytes(b"weights")
    sums = {"w": sha256(file)}
    assert sums["w"] == hashlib.sha256(b"weights").hexdigest()
    job = identity(
        "heal", 1, weights={"teacher": sums, "student": "ab"}, text={"text": ["a"]}, options={"n": (1, 2)}
    )
    assert job == {
        "verb": "heal",
        "version": 1,
        "digests": {"teacher w": sums["w"], "student": "ab", "text": digest_of(["a"])},
        "options": {"n": [1, 2]},
    }
    assert job == json.loads(json.dumps(job))
    assert digest_of(["a", "b"]) != digest_of(["ab"]) != digest_of([["ab"]])


def test_a_lock_is_one_process_and_one_file_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert lock(first) and not lock(second)
    with open(tmp_path / "lock", "w") as third:
        assert lock(third, wait=True)
