"""C++ operator, NumPy composition and readable oracle make and read the same bytes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit import _library
from gaugekit.coder import composition, encoder
from gaugekit.ops import processor
from gaugekit.ops.rans import operator as rans
from gaugekit.reference import rans as oracle

SYMBOLS = [(dtype, symbols) for dtype, choice in rans.SYMBOLS.items() for symbols in choice]
# Of the C++ code; the operator takes the widest there is for one that the processor lacks.
PATHS = range({"DEFAULT": 0, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 3) + 1)
VBMI2 = processor.PAIRS - {"avx512_bf16"} <= processor.flags() and PATHS[-1] == 3
SIZES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 500]


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def normal(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    scale = 0.02 if dtype.is_floating_point else 20
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check_all_paths(tensor: torch.Tensor, symbols: str, with_oracle: bool = True) -> bytes:
    """Encodes on every path, decodes each on every path, and returns the one blob."""
    data, shape, element = bits(tensor), tuple(tensor.shape), rans.ELEMENTS[tensor.dtype]
    blob = rans.encode(tensor, symbols, 14)
    for path in PATHS:
        assert torch.equal(rans.encode(tensor, symbols, 14, path), blob)
    assert encoder.encode(data, shape, element, rans.KINDS[symbols], 14).tobytes() == blob.numpy().tobytes()
    for path in PATHS:
        out = torch.empty_like(tensor)
        rans.decode(blob, 0, tensor.numel(), out, path)
        assert (bits(out) == data).all()
    again = np.empty_like(data)
    composition.decode(blob.numpy(), 0, tensor.numel(), again)
    assert (again == data).all()
    if with_oracle:
        assert (
            oracle.encode(data.tobytes(), shape, element, rans.KINDS[symbols], 14) == blob.numpy().tobytes()
        )
        assert oracle.decode(blob.numpy().tobytes()) == (data.tobytes(), shape, element)
    return blob.numpy().tobytes()


@pytest.mark.parametrize(("dtype", "symbols"), SYMBOLS)
@pytest.mark.parametrize("count", SIZES)
def test_paths_agree(dtype, symbols, count):
    check_all_paths(normal(count, dtype), symbols)


@pytest.mark.parametrize(("dtype", "symbols"), SYMBOLS)
@pytest.mark.parametrize("count", [16384, 24576, 24577, 40960, 70001])
def test_paths_agree_over_chunks(dtype, symbols, count):
    check_all_paths(normal(count, dtype), symbols, with_oracle=False)


def test_oracle_agrees_over_chunks():
    check_all_paths(normal(24577, torch.bfloat16), "exponent")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(SYMBOLS),
    count=st.integers(0, 700),
    alphabet=st.lists(st.binary(min_size=4, max_size=4), min_size=1, max_size=40),
    seed=st.integers(0, 2**32 - 1),
)
def test_arbitrary_bits_on_all_paths(kind, count, alphabet, seed):
    dtype, symbols = kind
    width = torch.empty(0, dtype=dtype).element_size()
    pick = np.random.default_rng(seed).geometric(0.4, count).clip(max=len(alphabet)) - 1
    data = bytearray(b"".join(alphabet[i][:width] for i in pick))
    tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    check_all_paths(tensor, symbols)


@pytest.fixture
def one_thread():
    """More threads take chunks one by one where there are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not VBMI2, reason="waits for a processor with AVX512-VBMI2")
@pytest.mark.parametrize("of_first", [2047, 2048, 2049, 4095, 4096])
@pytest.mark.parametrize(("dtype", "symbols"), [(torch.bfloat16, "exponent"), (torch.float16, "high-byte")])
def test_two_chunks_at_a_time(one_thread, dtype, symbols, of_first):
    """The form with VBMI2 takes frequencies up to 2048, and the chunks by twos. One of them may be raw, or shorter."""
    generator = torch.Generator().manual_seed(of_first)
    exponents = (torch.arange(16384) % 4096 >= of_first).to(torch.int16) + 120
    one = exponents << (7 if symbols == "exponent" else 8)
    one = (one + torch.randint(0, 127, (16384,), generator=generator).to(torch.int16)).view(dtype)
    one = one[torch.randperm(16384, generator=generator)]
    other = normal(16384, dtype)
    noise = torch.randint(-(2**15), 2**15, (16384,), generator=generator).to(torch.int16).view(dtype)
    for parts in (
        (one, one),
        (one, other),
        (other, one),
        (noise, one, other),
        (other, noise),
        (one, other[:9000]),
    ):
        check_all_paths(torch.cat(parts), symbols, with_oracle=False)


def with_exponents(exponents: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """bfloat16 numbers with these exponents, 0 to 255, in any order, and mantissas and signs of any kind."""
    generator = torch.Generator().manual_seed(seed)
    exponents = exponents[torch.randperm(len(exponents), generator=generator)]
    rest = torch.randint(0, 128, exponents.shape, generator=generator)
    return (exponents * 128 + rest).to(torch.int16).view(torch.bfloat16)


@pytest.mark.skipif(not VBMI2, reason="waits for a processor with AVX512-VBMI2")
def test_two_chunks_are_coded_at_a_time(one_thread):
    """Of each kind that tables can be: indices by the symbols' low bits or not, few breaks in the cells or many."""
    n, generator = 16384, torch.Generator().manual_seed(3)
    consecutive = 100 + torch.randint(0, 32, (n,), generator=generator)  # steps that spill more than 16 words
    same_low_bits = 32 * torch.randint(0, 8, (n,), generator=generator) + 3
    outliers = torch.where(torch.arange(n) % 500 == 0, torch.arange(n) // 500 % 256, consecutive % 20 + 90)
    tiny = (-torch.log2(torch.rand(n, generator=generator) + 1e-9)).long() + 60
    kinds = [with_exponents(k) for k in (consecutive, same_low_bits, outliers, tiny)]
    for first in kinds:
        for second in (*kinds, kinds[0][:9000], kinds[3][:1024]):
            check_all_paths(torch.cat([first, second]), "exponent", with_oracle=False)


@pytest.mark.skipif(not VBMI2, reason="waits for a processor with AVX512-VBMI2")
def test_of_two_chunks_the_first_error_is_told(one_thread):
    tensor = normal(16384 * 3, torch.bfloat16)
    blob = rans.encode(tensor, "exponent", 14)
    out = torch.empty_like(tensor)
    for at in range(200, len(blob), 997):  # behind the index
        damaged = blob.clone()
        damaged[at] ^= 4
        damaged[-1 - at // 9] ^= 1
        told = set()
        for path in PATHS:
            with pytest.raises(ValueError, match="not a sound coded blob") as caught:
                rans.decode(damaged, 0, tensor.numel(), out, path)
            told.add(str(caught.value))
        assert len(told) == 1


@pytest.mark.parametrize("size", [31, 32, 33, 64, 65, 128, 129, 256])
def test_alphabets_of_every_bucket_count(size):
    exponents = torch.arange(4096) % size
    exponents[1000:] = size // 2
    blob = check_all_paths((exponents << 7).to(torch.int16).view(torch.bfloat16), "exponent", size == 33)
    assert int.from_bytes(blob[64 + 12 : 64 + 14], "little") == size


def most_breaks(f: dict[int, int]) -> int:
    """The ranks of the symbols whose slots are in several pieces, one after another, in cells of 128: how often at most
    the distance from rank to slot changes within a cell. The encoder's fastest forms hold for 3 and for 6.
    """
    owners = oracle.slot_owners(f)
    slots = {s: [slot for slot, owner in enumerate(owners) if owner == s] for s in f}
    pieces = [s for s in slots.values() if s[-1] - s[0] >= len(s)]
    distance = [(slot - rank) % 4096 for rank, slot in enumerate(slot for s in pieces for slot in s)]
    cells = [distance[first : first + 128] for first in range(0, len(distance), 128)]
    return max((sum(a != b for a, b in pairwise(cell)) for cell in cells), default=0)


@pytest.mark.parametrize(
    ("others", "breaks"),
    [
        *[([127] * k, max(0, k - 1)) for k in range(7)],
        *[([105] * 20, 6), ([110] * 8, 7), ([127] * 31, 30), ([1 << k for k in range(11)], 1)],
    ],
)
def test_every_number_of_breaks(others, breaks):
    frequencies = dict(enumerate((4096 - sum(others), *others), start=-7))
    assert most_breaks(frequencies) == breaks
    symbols = torch.tensor([s for s, f in frequencies.items() for _ in range(4 * f)], dtype=torch.int8)
    shuffled = symbols[torch.randperm(len(symbols), generator=torch.Generator().manual_seed(breaks))]
    blob = check_all_paths(shuffled, "high-byte", with_oracle=False)
    assert len(blob) < len(symbols) or len(others) == 31


def bf16_exponents(*exponents: int) -> torch.Tensor:
    """5,000 elements of few exponents, every sign and mantissa."""
    n = torch.arange(5000)
    bits = torch.tensor(exponents)[n * n % 97 % len(exponents)] << 7 | n * 37 % 128 | (n % 3 % 2) << 15
    return bits.to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize(
    ("exponents", "method"),
    [
        ((120, 121), 1),
        ((0, 1), 1),
        ((0,), 1),
        ((0, 254, 255), 1),
        ((0, 60, 122), 1),
        ((60, 123), 2),
        ((1, 64), 2),
        ((0, 100, 255), 2),
    ],
)
def test_ten_bit_symbols_take_63_exponents_and_zero(exponents, method):
    """A chunk with exponents further apart is coded by its exponents alone."""
    tensor = bf16_exponents(*exponents)
    assert check_all_paths(tensor, "exponent-and-mantissa")[64 + 14] == method


def test_ten_bit_symbols_of_a_constant():
    blob = check_all_paths(torch.full((5000,), -1.75, dtype=torch.bfloat16), "exponent-and-mantissa")
    assert len(blob) == 64 + 32 + 256 + 16 + 16


def test_ten_bit_symbols_save_the_two_bits_they_code():
    """Order-0 entropy of exponent and two mantissa bits of N(0, 0.02^2) is 4.4704 bits, six are raw."""
    tensor = normal(1 << 18, torch.bfloat16)
    size = rans.encode(tensor, "exponent-and-mantissa", 18).numel()
    assert 10.47 < 8 * size / (1 << 18) < 10.51 < 8 * rans.encode(tensor, "exponent", 18).numel() / (1 << 18)


def test_a_constant_takes_no_words():
    blob = check_all_paths(torch.full((5000,), -1.5, dtype=torch.float32), "exponent")
    assert len(blob) == 64 + 32 + 256 + 16 + 3 * 16


def test_bf16_values_in_fp32_cost_no_low_planes():
    tensor = normal(20000, torch.bfloat16)
    narrow, wide = (
        rans.encode(tensor, "exponent", 14).numel(),
        rans.encode(tensor.float(), "exponent", 14).numel(),
    )
    assert wide == narrow + 2 * 16


def test_noise_is_stored_raw():
    data = np.random.default_rng(0).integers(0, 1 << 16, 4096).astype(np.int16)
    blob = check_all_paths(torch.from_numpy(data).view(torch.float16), "high-byte", with_oracle=False)
    assert len(blob) == 64 + 32 + 2 * 4096


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts_give_the_same_bytes(threads):
    tensor = normal(150000, torch.bfloat16)
    expected = rans.encode(tensor, "exponent", 14)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(rans.encode(tensor, "exponent", 14), expected)
        out = torch.empty_like(tensor)
        rans.decode(expected, 0, tensor.numel(), out)
        assert torch.equal(out, tensor)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 255, 256, 511, 512, 3071, 3072, 3073, 100003, (1 << 21) + 5])
def test_crc32c_paths_agree(size):
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    crc = rans.crc32c(torch.from_numpy(data))
    assert crc == composition.crc32c(data)
    assert (
        rans.crc32c(torch.from_numpy(data[size // 3 :]), rans.crc32c(torch.from_numpy(data[: size // 3])))
        == crc
    )
    assert composition.crc32c(data[size // 3 :], composition.crc32c(data[: size // 3])) == crc
    if size <= 4000:
        assert crc == oracle.crc32c(data.tobytes())


def test_operators_are_registered_as_their_schemas_say():
    tensor = normal(1000, torch.bfloat16)
    data, shape = tensor.view(torch.uint8), torch.tensor([1000])
    blob = rans.encode(tensor, "exponent", 14)
    ops = torch.ops.gaugekit
    torch.library.opcheck(ops.rans_encode.default, (data, shape, 1, 0, 14))
    torch.library.opcheck(ops.rans_open.default, (blob,))
    torch.library.opcheck(ops.rans_decode.default, (blob, 3, 700, torch.empty(697 * 2, dtype=torch.uint8)))
    torch.library.opcheck(ops.crc32c.default, (data, 0))
    rows, shifts = torch.zeros(2, 3, 4, dtype=torch.int16), torch.ones(2, 4, dtype=torch.int16)
    torch.library.opcheck(ops.shift_rows.default, (rows, shifts, torch.empty_like(rows)))


@pytest.mark.skipif(not _library.backends()["cpu"].loaded, reason="needs the C++ binary")
@pytest.mark.parametrize("name", ["rans_encode", "rans_open", "rans_decode", "crc32c", "shift_rows"])
def test_binary_registers_every_operator(name):
    assert _library.implementation(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, dtype=torch.float64), "exponent", 17), "tensor: expected one of bfloat16"),
        ((torch.zeros(3, dtype=torch.float16), "exponent", 17), "symbols: expected one of"),
        ((torch.zeros(3), "exponent-and-mantissa", 17), "symbols: expected one of"),
        ((torch.zeros(3, dtype=torch.int8), "exponent", 17), "symbols: expected one of"),
        ((torch.zeros(3), "exponent", 13), "chunk_log2: expected 14 to 20, got 13"),
        ((torch.zeros(3), "exponent", 21), "chunk_log2: expected 14 to 20, got 21"),
        ((torch.zeros(3, device="meta"), "exponent", 17), "tensor: expected a CPU tensor"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        rans.encode(*arguments)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize(
    "sizes", [(3, 5, 7), (2, 70, 96), (1, 300, 1000), (5, 1, 33), (0, 4, 4), (4, 0, 4), (4, 4, 0)]
)
def test_shifted_rows_wrap_around(dtype, sizes):
    limits = torch.iinfo(dtype)
    data = torch.randint(limits.min, limits.max, sizes, dtype=dtype)
    shifts = torch.randint(limits.min, limits.max, (sizes[0], sizes[2]), dtype=dtype)
    out = torch.empty_like(data)
    rans.shift_rows(data, shifts, out)
    assert torch.equal(out, data + shifts[:, None])
    with pytest.raises(RuntimeError):
        rans.shift_rows(data, shifts.view(-1), out)


@pytest.mark.parametrize("front", [16, 64])
def test_a_blob_behind_room_for_a_header_is_the_same(front):
    tensor = torch.randn(1000).bfloat16()
    blob = rans.encode(tensor, "exponent", 14)
    assert torch.equal(rans.encode(tensor, "exponent", 14, front=front)[front:], blob)
