"""The oracle against numbers worked by hand from docs/format.md."""

import itertools

import pytest

from gaugekit.reference import rans


def test_crc32c_of_the_standard():
    assert rans.crc32c(b"123456789") == 0xE3069283
    assert rans.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert rans.crc32c(b"") == 0


def test_the_sign_moves_below_the_exponent():
    assert (
        rans.to_symbol(0xBF81, 2, 0) == 0x7F << 8 | 0x80 | 0x01
    )  # -1.0078125: exponent 127, sign, mantissa 1
    assert rans.to_symbol(0xC0490FDB, 4, 0) == 0x80 << 24 | 0x800000 | 0x490FDB  # -pi
    assert rans.to_symbol(0x3C00, 2, 1) == 0x3C00
    for x in range(65536):
        assert rans.from_symbol(rans.to_symbol(x, 2, 0), 2, 0) == x


@pytest.mark.parametrize(
    ("count", "log2", "sizes"),
    [
        (0, 14, []),
        (1, 14, [1]),
        (16384, 14, [16384]),
        (24576, 14, [24576]),
        (24577, 14, [16384, 8193]),
        (40960, 14, [16384, 24576]),
        (49152, 14, [16384] * 3),
    ],
)
def test_chunks(count, log2, sizes):
    assert rans.chunk_sizes(count, log2) == sizes


def test_frequencies():
    assert rans.frequencies([7] * 9) == {7: 4096}
    assert rans.frequencies([1, 2]) == {1: 2048, 2: 2048}
    # Floors 1365 each leave one over; it goes to the first of equals.
    assert rans.frequencies([1, 2, 3]) == {1: 1366, 2: 1365, 3: 1365}
    # 8191 * 4096 / 8192 = 4095.5 is cut to 4095, the other, 0.5, is lifted to 1.
    assert rans.frequencies([5] * 8191 + [6]) == {5: 4095, 6: 1}
    # All 256 symbols once and one of them 10^5 times more: it pays for the others.
    many = rans.frequencies([0] * 100000 + list(range(1, 256)))
    assert many[0] == 4096 - 255
    assert sum(many.values()) == 4096


def test_slot_owners():
    # Two symbols in 32 buckets of 128: 4000 and 96. Bucket 1 keeps 96 slots of its own and lends 32 to
    # symbol 9.
    owners = rans.slot_owners({9: 4000, 200: 96})
    assert owners[:128] == [9] * 128
    assert owners[128:256] == [200] * 96 + [9] * 32
    assert owners[256:] == [9] * (4096 - 256)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 64, 65, 128, 129, 256])
def test_every_symbol_owns_its_frequency_and_buckets_hold_two(size):
    f = {s: 1 for s in range(256 - size, 256)}
    f[255 - size // 2] += 4096 - size
    owners = rans.slot_owners(f)
    assert {s: owners.count(s) for s in f} == f
    width = 4096 // max(32, 1 << (size - 1).bit_length())
    for bucket in range(0, 4096, width):
        run = owners[bucket : bucket + width]
        assert sum(a != b for a, b in itertools.pairwise(run)) <= 1


def test_one_step_by_hand():
    # Symbol 200 of the table above: state 2^15, frequency 96 owns slots 128..223.
    # 2^15 < 96 * 2^19, so no word; 32768 = 341 * 96 + 32: new state 341 * 4096 + slot (128 + 32).
    f = {9: 4000, 200: 96}
    states, words = rans.encode_symbols([200], f)
    assert states[0][0] == 341 * 4096 + 160
    assert states[0][1:] == [1 << 15] * 31 and states[1] == [1 << 15] * 32 and words == [[], []]
    assert rans.decode_symbols(1, f, states, words) == [200]


def test_a_word_is_written_when_the_state_is_full():
    # Two groups, lane 0: the state 341 * 4096 + 160 = 1396896 is below 96 * 2^19 = 50331648, so the second
    # symbol adds no word either; the third finds (1396896 // 96) * 4096 + ... = 59601024 > 50331648 and
    # writes its low 16 bits.
    f = {9: 4000, 200: 96}
    symbols = [9] * 192
    for place in (0, 64, 128):
        symbols[place] = 200
    second = (1396896 // 96) << 12 | 128 + 1396896 % 96
    assert second >= 96 << 19
    states, words = rans.encode_symbols(symbols, f)
    assert words[0] == [second & 0xFFFF]
    assert rans.decode_symbols(192, f, states, words) == symbols


def test_lanes_of_a_group():
    order = list(rans.steps(64))
    assert [element for _, _, element in order[:3]] == [0, 2, 4]
    assert order[16] == (0, 16, 1)
    assert order[32] == (1, 0, 32)
    assert sorted(element for _, _, element in order) == list(range(64))
    assert [element for _, _, element in rans.steps(3)] == [0, 2, 1]


def test_wrong_final_state_is_refused():
    f = {9: 4000, 200: 96}
    states, words = rans.encode_symbols([9] * 64, f)
    states[1][5] ^= 1 << 14
    with pytest.raises(ValueError, match="state"):
        rans.decode_symbols(64, f, states, words)
