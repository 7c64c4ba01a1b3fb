"""The coded blob of docs/format.md, written down in plain Python: one symbol at a time, one lane at a time.

The oracle of the tests: it shares no code with the C++ and NumPy paths. Range asymmetric numeral systems
(rANS: Duda, arXiv:1311.2540; interleaved lanes: Giesen, arXiv:1402.3392) with 12-bit probabilities, states
in [2^15, 2^31) and 16-bit words; slots are given to symbols by an alias table (Walker 1974; Vose 1991) built
from integers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MAGIC = b"GKRANS\x1a\n"
VERSION = 1
ELEMENT_BYTES = {1: 2, 2: 2, 3: 4, 4: 1, 5: 1, 6: 1}  # bf16, fp16, fp32, float8 e4m3, float8 e5m2, int8
# element -> kinds of symbols: 0 exponent, 1 high byte, 2 exponent and the two highest mantissa bits
KINDS_OF = {1: (0, 1, 2), 2: (1,), 3: (0, 1), 4: (1,), 5: (1,), 6: (1,)}
HEADER = "<8sHBBBBBBQQIIII"
ENTRY = "<QIHBBIIII"
SLOTS, LOWER, UPPER = 1 << 12, 1 << 15, 1 << 31


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720), one bit at a time."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 16)


def chunk_sizes(count: int, log2: int) -> list[int]:
    """Chunks of 2^log2 symbols; what is left joins the last one when it is at most half a chunk."""
    whole, rest = divmod(count, 1 << log2)
    sizes = [1 << log2] * whole
    if rest > 1 << (log2 - 1) or (rest and not sizes):
        sizes.append(rest)
    elif rest:
        sizes[-1] += rest
    return sizes


def to_symbol(x: int, width: int, kind: int) -> int:
    """Element bits -> y, whose top byte (ten bits with kind 2) is the symbol, the other bits being stored raw."""
    if kind == 1:
        return x
    if kind == 2:
        return (x & 0x7FE0) << 1 | x >> 15 << 5 | x & 31
    mantissa_bits = 8 * width - 9
    sign, exponent = x >> (8 * width - 1), (x >> mantissa_bits) & 255
    return (exponent << (mantissa_bits + 1)) | (sign << mantissa_bits) | (x & ((1 << mantissa_bits) - 1))


def from_symbol(y: int, width: int, kind: int) -> int:
    if kind == 1:
        return y
    if kind == 2:
        return (y >> 5 & 1) << 15 | y >> 1 & 0x7FE0 | y & 31
    mantissa_bits = 8 * width - 9
    exponent, sign = y >> (mantissa_bits + 1), (y >> mantissa_bits) & 1
    return (sign << (8 * width - 1)) | (exponent << mantissa_bits) | (y & ((1 << mantissa_bits) - 1))


def frequencies(symbols: list[int]) -> dict[int, int]:
    """Symbol -> frequency of 1 to 4096, summing to 4096: floors, then steps of one where they cost or gain
    most.

    One more (or less) for a symbol of count c and frequency f changes the bits by about c / (f ± 1/2).
    """
    counts = {s: symbols.count(s) for s in sorted(set(symbols))}
    f = {s: max(1, c * SLOTS // len(symbols)) for s, c in counts.items()}
    while sum(f.values()) > SLOTS:
        candidates = [s for s in f if f[s] > 1]
        best = candidates[0]
        for s in candidates:
            if counts[s] * (2 * f[best] - 1) < counts[best] * (2 * f[s] - 1):
                best = s
        f[best] -= 1
    while sum(f.values()) < SLOTS:
        best = next(iter(f))
        for s in f:
            if counts[s] * (2 * f[best] + 1) > counts[best] * (2 * f[s] + 1):
                best = s
        f[best] += 1
    return f


def slot_owners(f: dict[int, int]) -> list[int]:
    """For each of the 4096 slots the symbol that owns it: equal buckets, each shared by at most two
    symbols.
    """
    symbols = sorted(f)
    buckets = 32
    while buckets < len(symbols):
        buckets *= 2
    width = SLOTS // buckets
    rest = [f[s] for s in symbols] + [0] * (buckets - len(symbols))
    divider, alias = [width] * buckets, list(range(buckets))
    small = [b for b in range(buckets) if rest[b] < width]
    large = [b for b in range(buckets) if rest[b] > width]
    while small:
        s, donor = small.pop(), large[-1]
        divider[s], alias[s] = rest[s], donor
        rest[donor] -= width - rest[s]
        if rest[donor] <= width:
            large.pop()
        if rest[donor] < width:
            small.append(donor)
    return [symbols[b if r < divider[b] else alias[b]] for b in range(buckets) for r in range(width)]


def steps(n: int) -> Iterator[tuple[int, int, int]]:
    """The order in which a segment's decoder takes its symbols: (segment, lane, element), group by group."""
    for group in range(0, n, 64):
        for segment in (0, 1):
            for lane in range(32):
                element = group + 32 * segment + 2 * (lane % 16) + lane // 16
                if element < n:
                    yield segment, lane, element


def encode_symbols(symbols: list[int], f: dict[int, int]) -> tuple[list[list[int]], list[list[int]]]:
    """States and words of both segments; the coder runs backwards so that a decoder runs forwards."""
    owned = {s: [] for s in f}
    for slot, s in enumerate(slot_owners(f)):
        owned[s].append(slot)
    states = [[LOWER] * 32, [LOWER] * 32]
    words = [[], []]
    for segment, lane, element in reversed(list(steps(len(symbols)))):
        s = symbols[element]
        x = states[segment][lane]
        if x >= f[s] << 19:
            words[segment].append(x & 0xFFFF)
            x >>= 16
        states[segment][lane] = (x // f[s]) << 12 | owned[s][x % f[s]]
    return states, [w[::-1] for w in words]


def decode_symbols(n: int, f: dict[int, int], states: list[list[int]], words: list[list[int]]) -> list[int]:
    owners = slot_owners(f)
    rank, seen = [], dict.fromkeys(f, 0)
    for s in owners:
        rank.append(seen[s])
        seen[s] += 1
    symbols, used = [0] * n, [0, 0]
    states = [list(s) for s in states]
    for segment, lane, element in steps(n):
        x = states[segment][lane]
        slot = x & (SLOTS - 1)
        symbols[element] = owners[slot]
        x = f[owners[slot]] * (x >> 12) + rank[slot]
        if x < LOWER:
            x = x << 16 | words[segment][used[segment]]
            used[segment] += 1
        states[segment][lane] = x
    if states != [[LOWER] * 32] * 2 or used != [len(w) for w in words]:
        raise ValueError("a segment does not end in the state it began with, or leaves words")
    return symbols


def raw_bits(width: int, kind: int) -> int:
    """Bits of y below the symbol."""
    return 6 if kind == 2 else 8 * width - 8


def fits_kind_2(elements: list[int]) -> bool:
    """Whether the exponents that are not 0 are among 63 that follow each other."""
    exponents = {x >> 7 & 255 for x in elements} - {0}
    return not exponents or max(exponents) - min(exponents) < 63


def pack_six(values: bytes) -> bytes:
    """64 values of six bits -> 48 bytes: the first 48 in the low bits, the others two bits at a time above them."""
    packed = b""
    for start in range(0, len(values), 64):
        v = values[start : start + 64].ljust(64, bytes(1))
        packed += bytes(v[k] | (v[48 + k % 16] >> 2 * (k // 16) & 3) << 6 for k in range(48))
    return packed


def unpack_six(packed: bytes, n: int) -> bytes:
    values = b""
    for start in range(0, len(packed), 48):
        b = packed[start : start + 48]
        values += bytes(byte & 63 for byte in b)
        values += bytes(b[k] >> 6 | b[16 + k] >> 6 << 2 | b[32 + k] >> 6 << 4 for k in range(16))
    return values[:n]


def encode_chunk(data: bytes, width: int, kind: int) -> tuple[bytes, tuple]:
    """A chunk's bytes, and of its index entry (symbols, method, constant planes, words, words)."""
    n = len(data) // width
    elements = [int.from_bytes(data[i * width : (i + 1) * width], "little") for i in range(n)]
    method = 1
    if kind == 2 and not fits_kind_2(elements):
        method, kind = 2, 0
    y = [to_symbol(x, width, kind) for x in elements]
    symbols = [v >> raw_bits(width, kind) for v in y]
    f = frequencies(symbols)
    states, words = encode_symbols(symbols, f)
    coded = struct.pack("<64I", *states[0], *states[1])
    coded += padded(b"".join(struct.pack("<HH", s, f[s]) for s in f))
    coded += padded(struct.pack(f"<{len(words[0])}H", *words[0])) + padded(
        struct.pack(f"<{len(words[1])}H", *words[1])
    )
    constant = 0
    for plane in reversed(range(width - 1)):
        values = bytes(v >> (8 * plane) & (63 if kind == 2 else 255) for v in y)
        if len(set(values)) == 1:
            constant |= 1 << plane
            values = values[:1]
        elif kind == 2:
            values = pack_six(values)
        coded += padded(values)
    if len(coded) >= len(padded(data)):
        return padded(data), (0, 0, 0, 0, 0)
    return coded, (len(f), method, constant, len(words[0]), len(words[1]))


def encode(data: bytes, shape: tuple[int, ...], element: int, kind: int, chunk_log2: int) -> bytes:
    """A coded blob of the little-endian elements in ``data``."""
    width = ELEMENT_BYTES[element]
    count = len(data) // width
    sizes = chunk_sizes(count, chunk_log2)
    dims = padded(struct.pack(f"<{len(shape)}Q", *shape))
    offset = 48 + len(dims) + 32 * len(sizes)
    body, index, start = b"", b"", 0
    for n in sizes:
        piece = data[start * width : (start + n) * width]
        coded, (symbols, method, constant, *words) = encode_chunk(piece, width, kind)
        index += struct.pack(
            ENTRY, offset, len(coded), symbols, method, constant, *words, crc32c(coded), crc32c(piece)
        )
        body, offset, start = body + coded, offset + len(coded), start + n
    head = (
        MAGIC,
        VERSION,
        element,
        kind,
        0,
        1,
        chunk_log2,
        len(shape),
        count,
        offset,
        len(sizes),
        crc32c(index),
        0,
    )
    header = struct.pack(HEADER, *head, crc32c(struct.pack(HEADER, *head, 0) + dims))
    return header + dims + index + body


def decode(blob: bytes) -> tuple[bytes, tuple[int, ...], int]:
    """(elements as bytes, shape, element id) of a sound blob; ValueError where a checksum or a final state
    is wrong.
    """
    magic, version, element, kind, context, tables, log2, rank, count, _, chunks, index_crc, _, crc = (
        struct.unpack(HEADER, blob[:48])
    )
    if (magic, version, context, tables) != (MAGIC, VERSION, 0, 1) or kind not in KINDS_OF.get(element, ()):
        raise ValueError("not a blob this reader knows")
    begin = 48 + len(padded(bytes(8 * rank)))
    if crc != crc32c(blob[:44] + bytes(4) + blob[48:begin]):
        raise ValueError("the header's checksum is wrong")
    index = blob[begin : begin + 32 * chunks]
    if index_crc != crc32c(index):
        raise ValueError("the index's checksum is wrong")
    width, data = ELEMENT_BYTES[element], b""
    for i, n in enumerate(chunk_sizes(count, log2)):
        offset, length, symbols, method, constant, *words, coded_crc, decoded_crc = struct.unpack_from(
            ENTRY, index, 32 * i
        )
        coded = blob[offset : offset + length]
        if crc32c(coded) != coded_crc:
            raise ValueError("a chunk's coded bytes are damaged")
        piece = (
            decode_chunk(coded, n, width, 0 if method == 2 else kind, symbols, constant, words)
            if method
            else coded[: n * width]
        )
        if crc32c(piece) != decoded_crc:
            raise ValueError("a chunk's checksum is wrong")
        data += piece
    return data, struct.unpack_from(f"<{rank}Q", blob, 48), element


def decode_chunk(
    coded: bytes, n: int, width: int, kind: int, size: int, constant: int, words: list[int]
) -> bytes:
    place = 0

    def section(length: int) -> bytes:
        nonlocal place
        start, place = place, place + length + -length % 16
        return coded[start : start + length]

    states = struct.unpack("<64I", section(256))
    pairs = struct.unpack(f"<{2 * size}H", section(4 * size))
    streams = [list(struct.unpack(f"<{w}H", section(2 * w))) for w in words]
    f = dict(zip(pairs[::2], pairs[1::2], strict=True))
    symbols = decode_symbols(n, f, [list(states[:32]), list(states[32:])], streams)
    y = [s << raw_bits(width, kind) for s in symbols]
    for plane in reversed(range(width - 1)):
        if constant >> plane & 1:
            values = section(1) * n
        else:
            values = unpack_six(section((n + 63) // 64 * 48), n) if kind == 2 else section(n)
        y = [v | b << (8 * plane) for v, b in zip(y, values, strict=True)]
    return b"".join(from_symbol(v, width, kind).to_bytes(width, "little") for v in y)
