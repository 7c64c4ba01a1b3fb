"""KVCodec: any bits of any shape come back, every flipped byte is reported, a block is no larger than was said."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit.codec import CorruptFile, KVCodec, KVStore, KVTables
from gaugekit.codec.kv.block import ORDERS, described
from kv_blocks import random_bits, same

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
BOTH = [(dtype, "rans") for dtype in DTYPES] + [(dtype, "fixed") for dtype in DTYPES[:2]]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(BOTH),
    axes=st.sampled_from(ORDERS),
    sizes=st.tuples(*[st.integers(0, 5)] * 5),
    spread=st.sampled_from([None, 0.0, 3.0]),
    how=st.sampled_from(["none", "given", "embedded"]),
    seed=st.integers(0, 1000),
)
def test_any_bits_of_any_shape_come_back(kind, axes, sizes, spread, how, seed):
    dtype, layout = kind
    shape = sizes[: len(axes)]
    if spread is None:
        block = random_bits(shape, dtype, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        block = (torch.randn(shape, generator=generator) * 10**spread).to(dtype)
    tables = KVTables.calibrate(random_bits(shape, dtype, seed + 1), axes) if how != "none" else None
    codec = KVCodec(axes, tables=tables, layout=layout, embed=how == "embedded")
    data = codec.encode(block, "a")
    assert data.numel() <= codec.most_bytes(shape, dtype)
    assert described(data) == (data.numel(), dtype, block.shape)
    reader = KVCodec("SD", tables=tables) if how == "given" else KVCodec("SD")
    assert same(reader.decode(data, key="a"), block)
    out = torch.empty_like(block)
    assert reader.decode(data.numpy().tobytes(), out, key="a") is out and same(out, block)


@pytest.mark.parametrize(("dtype", "layout"), BOTH, ids=str)
def test_the_worst_block_is_no_larger_than_was_said(dtype, layout):
    for shape in ((1, 1, 1, 1), (2, 2, 300, 100), (2, 4, 300, 128)):
        codec = KVCodec(layout=layout, embed=True)
        block = random_bits(shape, dtype)
        codec.tables = KVTables.calibrate(block)
        assert codec.encode(block).numel() <= codec.most_bytes(shape, dtype)


def test_views_and_gradients_are_taken(blocks):
    codec = KVCodec(tables=KVTables.calibrate(blocks[0]))
    turned = blocks[0].transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    assert same(codec.decode(codec.encode(turned)), blocks[0])
    conjugate = torch.imag(torch.complex(blocks[0].float(), blocks[0].float()).conj())  # a view that negates
    assert conjugate.is_neg()
    plain = KVCodec()
    assert same(plain.decode(plain.encode(conjugate)), -blocks[0].float())


def test_tables_save_bytes_and_embedded_ones_cost_their_own(blocks):
    tables = KVTables.calibrate(blocks[0])
    without = KVCodec().encode(blocks[1]).numel()
    given_ones = KVCodec(tables=tables).encode(blocks[1]).numel()
    embedded = KVCodec(tables=tables, embed=True).encode(blocks[1]).numel()
    assert given_ones < 0.97 * without
    assert embedded - given_ones == -(-len(tables.to_bytes()) // 16) * 16
    short = blocks[1][:, :, :2]  # the tables would be more than a thirty-second: coded without
    assert KVCodec(tables=tables, embed=True).encode(short).numel() == KVCodec().encode(short).numel()


@pytest.mark.parametrize("layout", ["rans", "fixed"])
@pytest.mark.parametrize("embed", [False, True])
def test_every_flipped_byte_and_every_cut_is_reported(layout, embed, blocks):
    tables = KVTables.calibrate(blocks[0][:1, :1, :, :4])
    codec = KVCodec(tables=tables, layout=layout, embed=embed)
    codec_without = KVCodec() if embed else codec
    data = codec.encode(blocks[0][:1, :1, :, :4].contiguous(), "key")
    out = torch.zeros(1, 1, 64, 4, dtype=torch.bfloat16)
    for place in range(data.numel()):
        damaged = data.clone()
        damaged[place] ^= 1 << place % 8
        with pytest.raises(CorruptFile):
            codec_without.decode(damaged, out, "key")
    for end in range(0, data.numel(), 37):
        with pytest.raises(CorruptFile):
            codec_without.decode(data[:end], key="key")
    with pytest.raises(CorruptFile):
        codec_without.decode(torch.cat([data, data[:1]]), key="key")
    assert same(codec_without.decode(data, key="key"), blocks[0][:1, :1, :, :4])


def test_a_block_of_another_key_or_of_other_tables_is_reported(blocks):
    tables = KVTables.calibrate(blocks[0])
    codec = KVCodec(tables=tables)
    data = codec.encode(blocks[0], "a")
    for key in ("b", None):
        with pytest.raises(CorruptFile, match="another key"):
            codec.decode(data, key=key)
    with pytest.raises(CorruptFile, match="another key"):
        codec.decode(codec.encode(blocks[0]), key="a")
    for other in (None, KVTables.calibrate(2 * blocks[0])):
        with pytest.raises(CorruptFile, match=f"{tables.digest:016x}.*not at hand"):
            KVCodec(tables=other).decode(data, key="a")


def test_threads_share_a_codec(blocks):
    codec = KVCodec(tables=KVTables.calibrate(blocks[0]), embed=True)
    wrong = []

    def turn(number):
        for _ in range(20):
            block = blocks[number] * (number + 1)
            if not same(codec.decode(codec.encode(block)), block):
                wrong.append(number)

    threads = [threading.Thread(target=turn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: KVCodec("LSD").encode(b), "block: expected 3 dimensions"),
        (lambda b: KVCodec().encode(b.double()), "tensor: expected one of bfloat16"),
        (lambda b: KVCodec().encode(b.to("meta")), "block: expected one on the CPU"),
        (lambda b: KVCodec().encode(b.numpy), "block: expected a torch.Tensor, dense, got builtin"),
        (lambda b: KVCodec().encode(None), "block: expected a torch.Tensor, dense, got NoneType"),
        (
            lambda b: KVCodec().encode(b.to_sparse()),
            "block: expected a torch.Tensor, dense, got torch.sparse_coo",
        ),
        (lambda b: KVStore().put("a", None), "block: expected a torch.Tensor, dense, got NoneType"),
        (lambda b: KVCodec().encode(b, ""), "key: expected a string or bytes"),
        (lambda b: KVCodec().encode(b, 3), "key: expected a string or bytes"),
        (lambda b: KVCodec(tables=KVTables.calibrate(b)).encode(b[:1]), "block: expected torch.bfloat16"),
        (lambda b: KVCodec(tables=KVTables.calibrate(b)).encode(b.half()), "block: expected torch.bfloat16"),
        (
            lambda b: KVCodec(tables=KVTables.calibrate(b)).encode(b.double()),
            "block: expected torch.bfloat16",
        ),
        (lambda b: KVCodec(layout="zip"), "layout: expected one of"),
        (lambda b: KVCodec(layout="fixed", symbols="exponent"), "symbols: expected None"),
        (lambda b: KVCodec(layout="fixed").encode(b.float()), "tensor: expected bfloat16 or float16"),
        (lambda b: KVCodec().decode(KVCodec().encode(b), torch.empty(3)), "out: expected"),
        (lambda b: KVCodec().decode(KVCodec(layout="fixed").encode(b), torch.empty(3)), "out: expected"),
        (
            lambda b: KVCodec().decode(KVCodec(layout="fixed").encode(b), b.mT.contiguous().mT),
            "out: expected",
        ),
        (lambda b: KVCodec().decode(KVCodec(layout="fixed").encode(b), b.numpy), "out: expected"),
    ],
)
def test_bad_input(call, message, blocks):
    with pytest.raises(ValueError, match=message):
        call(blocks[0])
