"""KVTables: each channel's median exponent comes to one place; saved ones come back or are reported damaged."""

import pytest
import torch

from gaugekit.codec import CorruptFile, KVTables

CENTRES = {torch.bfloat16: 127, torch.float16: 15, torch.float32: 127}


@pytest.mark.parametrize("dtype", CENTRES, ids=str)
def test_a_channel_of_powers_of_two_is_moved_by_its_exponent(dtype):
    """By hand: 2^e has the biased exponent e + centre, so its channel's shift is −e."""
    exponents = torch.tensor([[-3, 0, 5], [2, -7, 1]])  # [P, D]
    block = torch.ldexp(torch.ones(2, 1, 4, 3), exponents.view(2, 1, 1, 3)).to(dtype)
    block[:, :, 1:] *= -1.5  # sign and mantissa do not count
    tables = KVTables.calibrate(block)
    assert torch.equal(tables.shifts, -exponents.view(2, 1, 3).to(torch.int8))
    assert tables.dtype == dtype


def test_the_median_counts_and_zeros_do_not():
    """By hand: exponents 0, 0, 4 have the median 0; zeros beside them change nothing; zeros alone are not moved."""
    channel = torch.tensor([1.0, 1.0, 16.0, 0.0, 0.0, 0.0, 0.0])
    block = torch.stack([channel, torch.zeros(7)], dim=1).bfloat16()[None, None]
    assert KVTables.calibrate(block).shifts.tolist() == [[[0, 0]]]
    assert KVTables.calibrate(4 * block).shifts.tolist() == [[[-2, 0]]]


def test_several_blocks_are_counted_together(blocks):
    assert torch.equal(KVTables.calibrate(blocks).shifts, KVTables.calibrate(torch.cat(blocks, dim=2)).shifts)


@pytest.mark.parametrize("axes", ["PLSGD", "PSLGD", "PGSLD", "LSPGD", "DGSLP"])
def test_the_order_of_the_axes_changes_nothing(axes, blocks):
    plain = blocks[0].view(2, 3, 64, 4, 8)  # P L S G D
    turned = plain.permute(["PLSGD".index(letter) for letter in axes])
    tables = KVTables.calibrate(turned, axes)
    assert torch.equal(tables.shifts, KVTables.calibrate(blocks[0]).shifts)
    moved, expected = torch.empty_like(plain), torch.empty(turned.shape, dtype=torch.bfloat16)
    tables.add_to(plain, "PLSGD", moved)
    tables.add_to(turned.contiguous(), axes, expected)
    assert torch.equal(expected, moved.permute(["PLSGD".index(letter) for letter in axes]))


def test_absent_axes_have_size_one(blocks):
    assert KVTables.calibrate(blocks[0][0, 0], "SD").shifts.shape == (1, 1, 32)
    assert KVTables.calibrate(blocks[0][0], "LSD").shifts.shape == (1, 3, 32)


def test_tables_survive_a_file_and_every_flipped_byte_is_reported(tmp_path, blocks):
    tables = KVTables.calibrate(blocks[0][:1, :1])
    tables.save(tmp_path / "t")
    loaded = KVTables.load(tmp_path / "t")
    assert torch.equal(loaded.shifts, tables.shifts) and loaded.digest == tables.digest
    assert loaded.digest != KVTables.calibrate(2 * blocks[0][:1, :1]).digest
    data = (tmp_path / "t").read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x20
        with pytest.raises(CorruptFile):
            KVTables.from_bytes(bytes(damaged))
    (tmp_path / "t").write_bytes(data[:-1])
    with pytest.raises(CorruptFile, match=f"{tmp_path / 't'}.*number"):
        KVTables.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: KVTables.calibrate([]), "blocks: expected at least one"),
        (lambda b: KVTables.calibrate(b.int()), "blocks: expected one of bfloat16"),
        (lambda b: KVTables.calibrate(b, "PLD"), "axes: expected letters of PLSGD"),
        (lambda b: KVTables.calibrate(b, "PLSS"), "axes: expected letters of PLSGD"),
        (lambda b: KVTables.calibrate(b, "PLSGD"), "block: expected 5 dimensions"),
        (lambda b: KVTables.calibrate([b, b[:1]]), r"blocks: expected \(dtype, P, L, channels\)"),
        (lambda b: KVTables(torch.zeros(2, 3), torch.bfloat16), "shifts: expected int8"),
        (lambda b: KVTables(torch.zeros(1, 1, 1, dtype=torch.int8), torch.int8), "dtype: expected one of"),
    ],
)
def test_bad_input(call, message, blocks):
    with pytest.raises(ValueError, match=message):
        call(blocks[0])
