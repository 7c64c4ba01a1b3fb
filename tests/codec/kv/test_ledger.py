"""Ledger: never above its limit, the least recently used go first, nobody waits for one who waits."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit.codec.kv.ledger import Ledger


def put(ledger: Ledger, name: bytes, size: int) -> list[bytes]:
    room, gone = ledger.reserve(size, name)
    assert room
    ledger.settle(size, name)
    return gone


def test_the_least_recently_used_go_first():
    ledger = Ledger(10)
    for name in (b"a", b"b", b"c"):
        assert put(ledger, name, 3) == []
    assert ledger.touch(b"a") and not ledger.touch(b"x")
    assert put(ledger, b"d", 4) == [b"b"]  # 3 + 3 + 4 are ten
    assert put(ledger, b"e", 5) == [b"c", b"a"]
    assert ledger.held_bytes == 9 and list(ledger.sizes) == [b"d", b"e"]


def test_what_a_name_held_stays_while_there_is_room_for_both():
    ledger = Ledger(10)
    put(ledger, b"a", 4)
    room, gone = ledger.reserve(6, b"a")
    assert room and gone == [] and b"a" in ledger.sizes
    ledger.settle(6, b"a", written=False)
    assert ledger.sizes == {b"a": 4} and ledger.reserved_bytes == 0
    assert ledger.reserve(7, b"a") == (True, [b"a"])


def test_two_that_wait_do_not_wait_for_each_other():
    ledger = Ledger(100)
    put(ledger, b"a", 50)
    put(ledger, b"b", 50)
    writing = {b"a", b"b"}
    assert ledger.reserve(90, b"a", writing) == (False, [b"a"])
    assert ledger.reserve(90, b"b", writing) == (True, [b"b"])


@settings(max_examples=100, deadline=None)
@given(
    limit=st.integers(1, 40),
    calls=st.lists(st.tuples(st.sampled_from(b"abcdef"), st.integers(0, 40), st.booleans()), max_size=40),
)
def test_never_above_the_limit(limit, calls):
    ledger, waiting = Ledger(limit), []
    for letter, size, at_once in calls:
        name = bytes([letter])
        room, gone = ledger.reserve(size, name)
        assert not set(gone) & set(ledger.sizes)
        if room:
            waiting.append((size, name))
        if at_once and waiting:
            ledger.settle(*waiting.pop())
        assert ledger.held_bytes == sum(ledger.sizes.values())
        assert ledger.reserved_bytes == sum(size for size, _ in waiting)
        assert ledger.held_bytes + ledger.reserved_bytes <= limit
