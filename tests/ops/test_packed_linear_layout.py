"""Packing loses no bit of any pattern, every path makes and reads the same bytes, and damage is refused or harmless."""

import os
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gaugekit as gk
from gaugekit import _library
from gaugekit.ops.packed_linear import layout
from gaugekit.ops.packed_linear.weight import check, pack_weight, packed_rows
from gaugekit.reference import packed_linear as reference
from warm import python

E5M2 = torch.float8_e5m2
DTYPES = [torch.bfloat16, torch.float16, E5M2]


def bits(x):
    return x.view(torch.int8 if x.dtype == E5M2 else torch.int16)


def patterns(n, k, dtype, spread, seed):
    """Words whose exponents lie ``spread`` apart around one value: from constant to every bit pattern there is."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**15), 2**15, (n, k), dtype=torch.int16, generator=generator)
    first, largest, _ = layout.fields(dtype)
    near = torch.randint(0, largest + 1, (), generator=generator)
    wild = torch.randint(0, max(1, spread), (n, k), generator=generator)
    exponents = ((near + wild) % (largest + 1)).to(torch.int16)
    words = words & ~(largest << first) | exponents << first
    return (words >> 8).to(torch.int8).view(dtype) if dtype == E5M2 else words.view(dtype)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 4), k=st.integers(0, 200), dtype=st.sampled_from(DTYPES), code=st.sampled_from([None, 3, 4]),
    spread=st.sampled_from([1, 6, 7, 8, 15, 16, 30, 256]), seed=st.integers(0, 2**30),
)  # fmt: skip
def test_round_trip_and_agreement(n, k, dtype, code, spread, seed):
    if dtype == E5M2 and not k:
        return  # refused
    weight = patterns(n, k, dtype, spread, seed)
    packed = pack_weight(weight, code_bits=code)
    assert packed.dtype == dtype
    for made, expected in zip(packed, reference.pack(weight, code), strict=False):
        assert made.dtype == expected.dtype and torch.equal(made, expected)
    check(packed)
    for back in (gk.unpack_weight(packed), layout.rows(None, *packed), reference.unpack(*packed)):
        assert torch.equal(bits(back), bits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1024, 1025, 2500])
def test_segments(dtype, k):
    weight = patterns(3, k, dtype, 8, k)
    packed = pack_weight(weight, code_bits=3)
    assert all(torch.equal(a, b) for a, b in zip(packed, reference.pack(weight, 3), strict=False))
    assert torch.equal(bits(gk.unpack_weight(packed)), bits(weight))
    index = torch.tensor([2, 0, 2])
    assert torch.equal(bits(packed_rows(index, packed)), bits(weight[index]))
    assert torch.equal(bits(layout.rows(index, *packed)), bits(weight[index]))


@pytest.mark.parametrize("dtype", DTYPES[:2])  # float8_e5m2 is packed as float16
def test_composition_encodes_the_same(dtype):
    weight = patterns(5, 1500, dtype, 9, 1)
    for code in (3, 4):
        packed, found = pack_weight(weight, code_bits=code), layout.survey(weight)
        assert torch.equal(found[:, code - 3, 0].to(torch.uint8), packed.window)
        begins = torch.nn.functional.pad(found[:, code - 3, 1].cumsum(0), (1, 0))
        made = layout.encode(weight, packed.window, begins, code, packed.escapes.numel())
        assert all(torch.equal(a, b) for a, b in zip(made, packed, strict=False))


def test_every_word_there_is():
    words = torch.arange(-(2**15), 2**15).to(torch.int16).view(64, 1024)
    for dtype in DTYPES[:2]:
        weight = words[torch.randperm(64)].contiguous().view(dtype)
        assert torch.equal(bits(gk.unpack_weight(pack_weight(weight))), bits(weight))
    weight = torch.randperm(4096).to(torch.uint8).view(4, 1024).view(E5M2)
    for code in (None, 3, 4):
        assert torch.equal(bits(gk.unpack_weight(pack_weight(weight, code_bits=code))), bits(weight))


def test_strides_and_input_unchanged():
    weight = torch.randn(70, 6).bfloat16()
    before = weight.clone()
    assert torch.equal(gk.unpack_weight(pack_weight(weight.T)), weight.T)
    narrow = weight.to(E5M2)
    assert torch.equal(bits(gk.unpack_weight(pack_weight(narrow.T))), bits(narrow.T))
    assert torch.equal(weight, before)


def test_size_of_normal_weights():
    packed = pack_weight((torch.randn(256, 4096) * 0.02).bfloat16())
    assert packed.bytes <= 0.71 * packed.shape.numel() * 2
    packed = pack_weight((torch.randn(256, 4096) * 0.02).to(E5M2))
    assert 0.77 * packed.shape.numel() <= packed.bytes <= 0.79 * packed.shape.numel()


def damaged(packed, **parts):
    return packed._replace(**parts)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda p: damaged(p, escapes=p.escapes[:-1]),
        lambda p: damaged(p, offsets=p.offsets.flip(0)),
        lambda p: damaged(p, offsets=torch.full_like(p.offsets, 2**31 - 1)),
        lambda p: damaged(p, offsets=torch.full_like(p.offsets, -5)),
        lambda p: damaged(p, escapes=p.escapes[:0]),
    ],
)
def test_damage_is_refused_and_reads_nothing_beyond(break_it):
    broken = break_it(pack_weight(patterns(40, 1100, torch.bfloat16, 8, 0), code_bits=3))
    with pytest.raises(ValueError, match="packed.offsets"):
        gk.unpack_weight(broken)
    ours = torch.ops.gaugekit.packed_rows(None, *broken)  # no crash, and what the composition says
    assert torch.equal(bits(ours), bits(layout.rows(None, *broken)))


def test_float8_e5m2_is_known_by_its_parts_and_others_without_raw_bytes_are_refused():
    packed = pack_weight(patterns(4, 130, E5M2, 8, 0), code_bits=3)
    assert packed.raw.shape == (4, 0) and packed.planes.shape == (4, 6, 3)
    broken = damaged(pack_weight(torch.randn(4, 130).bfloat16()), raw=packed.raw)
    with pytest.raises(ValueError, match=r"packed.raw: expected torch.uint8 \[4, 192\]"):
        gk.unpack_weight(broken)
    with pytest.raises(ValueError, match="packed.offsets"):
        gk.unpack_weight(damaged(packed, escapes=packed.escapes[:-1]))
    ours = torch.ops.gaugekit.packed_rows(None, *damaged(packed, offsets=packed.offsets - 5))
    assert ours.dtype == E5M2 and ours.shape == (4, 130)


@pytest.mark.parametrize("name", ["raw", "planes", "window", "offsets"])
def test_parts_of_other_shapes_are_refused(name):
    packed = pack_weight(torch.randn(4, 130).bfloat16())
    broken = damaged(packed, **{name: getattr(packed, name)[:-1]})
    with pytest.raises(ValueError, match="packed."):
        gk.unpack_weight(broken)
    if _library.implementation("packed_linear"):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.gaugekit.packed_linear(torch.zeros(1, 130).bfloat16(), *broken[:5], None, True)


SCRIPT = """
import sys, torch, gaugekit as gk
torch.manual_seed(0)
out = []
for dtype in (torch.bfloat16, torch.float16):
    weight = (torch.randint(-999, 999, (37, 1500)) / 2**14).to(dtype)  # torch.randn differs between levels itself
    weight[:, ::97] *= 1e3
    for code in (3, 4):
        packed = gk.pack_weight(weight, code_bits=code)
        out += [*packed[:5], gk.unpack_weight(packed)]
        out += [gk.packed_linear((torch.randint(-99, 99, (b, 1500)) / 16).to(dtype), packed) for b in (1, 2, 3, 5, 16)]
weight = (torch.randint(-999, 999, (37, 1500)) / 2**14).to(torch.float8_e5m2)
weight[:, ::97] = 300.0
packed = gk.pack_weight(weight)
out += [*packed[:5], gk.unpack_weight(packed).view(torch.uint8)]
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    out += [gk.packed_linear((torch.randint(-99, 99, (b, 1500)) / 16).to(dtype), packed) for b in (1, 2, 3, 5, 16)]
torch.save(out, sys.argv[1])
"""


@pytest.mark.skipif(not _library.implementation("packed_linear"), reason="needs the CPU binary")
def test_instruction_sets_agree(tmp_path):
    """The portable, AVX2 and widest paths make the same bytes, and the same bits of the product."""
    results = []
    for level in ("default", "avx2", "avx512"):
        target = tmp_path / level
        subprocess.run([*python(), "-c", SCRIPT, str(target)], check=True,
                       env=os.environ | {"ATEN_CPU_CAPABILITY": level})  # fmt: skip
        results.append(torch.load(target))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
