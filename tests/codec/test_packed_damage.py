"""A damaged packed file, or a hostile one with its checksums made right, is refused with CorruptFile and
leaves nothing.
"""

import json
import random
import re

import pytest
import torch
from safetensors.torch import save_file

from gaugekit import codec
from gaugekit.ops.rans import crc32c as checksum


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    generator = torch.Generator().manual_seed(9)
    weight = (torch.randn(700, generator=generator) * 0.02).bfloat16()
    save_file(
        {"weight": weight, "ids": torch.arange(5), "tiny": weight[:3].clone()}, folder / "a.safetensors"
    )
    codec.pack(folder / "a.safetensors", folder / "b.safetensors")
    return (folder / "a.safetensors").read_bytes(), (folder / "b.safetensors").read_bytes()


def crc32c(data: bytes) -> int:
    return checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def write(path, data: bytes) -> None:
    """Over what stands there: to cut a file off first is what a file system waits for, thousands of times here."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


def unpack(data: bytes, folder) -> bytes:
    write(folder / "in.safetensors", data)
    try:
        codec.unpack(folder / "in.safetensors", folder / "out" / "out.safetensors")
        return (folder / "out" / "out.safetensors").read_bytes()
    except ValueError:
        assert not list((folder / "out").glob("*"))
        raise


def test_every_flipped_byte_is_detected(files, tmp_path):
    original, packed = files
    assert unpack(packed, tmp_path) == original
    (tmp_path / "out" / "out.safetensors").unlink()
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 0x15
        with pytest.raises(codec.CorruptFile):
            unpack(bytes(damaged), tmp_path)


def read(data: bytes, folder) -> dict[str, tuple]:
    """What the readers say is in the file: whole tensors, and rows of each."""
    path = folder / "in.safetensors"
    write(path, data)
    try:
        whole = codec.load_file(path)
        with codec.safe_open(path) as file:
            rows = {name: file.get_slice(name)[1:3] for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except codec.CorruptFile as error:
        assert str(error).startswith(str(path))
        raise
    return {name: (t.tolist(), rows[name].tolist(), t.dtype, metadata) for name, t in whole.items()}


def test_readers_detect_every_flipped_byte_or_it_is_harmless(files, tmp_path):
    original, packed = files
    expected, harmless = read(original, tmp_path), 0
    assert read(packed, tmp_path) == expected
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 0x15
        try:
            assert read(bytes(damaged), tmp_path) == expected, f"byte {place}"
        except codec.CorruptFile:
            continue
        harmless += 1
    assert harmless < 16 * 6, "only padding between the sections of a chunk may be flipped without being seen"


def test_a_slice_alone_detects_damage(files, tmp_path):
    """Rows of a tensor stored raw have no checksum of their own: the tensor's is looked at first."""
    data = bytearray(files[1])
    data[-1] ^= 1  # the last byte of "tiny"
    (tmp_path / "x").write_bytes(data)
    with codec.safe_open(tmp_path / "x") as file:
        assert file.get_slice("ids")[:2].tolist() == [0, 1]
        for _ in range(2):
            with pytest.raises(codec.CorruptFile, match="x: tensor 'tiny': the checksum"):
                file.get_slice("tiny")[:1]


def test_every_truncation_is_detected(files, tmp_path):
    _, packed = files
    for size in range(len(packed)):
        write(tmp_path / "x", packed[:size])
        with pytest.raises(codec.CorruptFile):
            codec.safe_open(tmp_path / "x")
    for size in [*range(64), *range(64, len(packed), 41), len(packed) - 1]:
        for verb in (unpack, read):
            with pytest.raises(codec.CorruptFile):
                verb(packed[:size], tmp_path)
    for verb in (unpack, read):
        with pytest.raises(codec.CorruptFile):
            verb(packed + b"\0", tmp_path)


def change(packed: bytes, outer=None, inner=None) -> bytes:
    """The file with its header or its gaugekit entry changed, and the header's checksum made right."""
    length = int.from_bytes(packed[:8], "little")
    header = json.loads(packed[8 : 8 + length])
    entry = json.loads(header["__metadata__"]["gaugekit"])
    if inner:
        inner(entry)
    entry["header_crc32c"] = "00000000"
    header["__metadata__"]["gaugekit"] = json.dumps(entry, separators=(",", ":"))
    if outer:
        outer(header)
    raw = json.dumps(header, separators=(",", ":")).encode()
    digits = b"%08x" % crc32c(len(raw).to_bytes(8, "little") + raw)
    raw = raw.replace(b'header_crc32c\\":\\"00000000', b'header_crc32c\\":\\"' + digits)
    return len(raw).to_bytes(8, "little") + raw + packed[8 + length :]


def test_changing_nothing_is_sound(files, tmp_path):
    original, packed = files
    assert unpack(change(packed), tmp_path) == original


def original_header(edit):
    def apply(entry):
        header = json.loads(entry["header"])
        edit(header)
        entry["header"] = json.dumps(header)

    return apply


HOSTILE = {
    "version 2": {"inner": lambda e: e.update(version=2)},
    "unknown codec": {"inner": lambda e: e["tensors"].update(weight=["zstd", 1])},
    "checksum of another tensor": {"inner": lambda e: e["tensors"].update(ids=e["tensors"]["weight"])},
    "coded said raw": {"inner": lambda e: e["tensors"]["weight"].__setitem__(0, "raw")},
    "raw said coded": {"inner": lambda e: e["tensors"]["tiny"].__setitem__(0, "rans")},
    "checksum not a number": {"inner": lambda e: e["tensors"].update(ids=["raw", "x"])},
    "a tensor without codec": {"inner": lambda e: e["tensors"].pop("ids")},
    "a codec without tensor": {"inner": lambda e: e["tensors"].update(more=["raw", 0])},
    "no tensors": {"inner": lambda e: e.pop("tensors")},
    "no header": {"inner": lambda e: e.pop("header")},
    "header not JSON": {"inner": lambda e: e.update(header="{")},
    "header a list": {"inner": lambda e: e.update(header="[]")},
    "deep header": {"inner": lambda e: e.update(header="[" * 100000)},
    "another shape": {"inner": original_header(lambda h: h["weight"].update(shape=[350, 2]))},
    "another dtype": {"inner": original_header(lambda h: h["weight"].update(dtype="F16"))},
    "more elements": {
        "inner": original_header(lambda h: h["weight"].update(shape=[1 << 59], data_offsets=[0, 1 << 60]))
    },
    "original hole": {"inner": original_header(lambda h: h["ids"].update(data_offsets=[1, 41]))},
    "stored hole": {
        "outer": lambda h: h["tiny"].update(data_offsets=[o + 8 for o in h["tiny"]["data_offsets"]])
    },
    "stored overlap": {"outer": lambda h: h["ids"].update(data_offsets=[0, 40])},
    "stored descending": {"outer": lambda h: h["ids"].update(data_offsets=h["ids"]["data_offsets"][::-1])},
    "stored past the end": {"outer": lambda h: h["tiny"].update(data_offsets=[0, 1 << 62])},
    "stored offsets of text": {"outer": lambda h: h["tiny"].update(data_offsets=["0", "6"])},
    "stored offsets true": {"outer": lambda h: h["tiny"].update(data_offsets=[False, True])},
    "negative shape": {"outer": lambda h: h["tiny"].update(shape=[-3])},
    "shape of 65": {"outer": lambda h: h["tiny"].update(shape=[1] * 64 + [3])},
    "an extra field": {"outer": lambda h: h["tiny"].update(extra=1)},
    "entry a list": {"outer": lambda h: h.update(tiny=[])},
    "metadata of numbers": {"outer": lambda h: h["__metadata__"].update(number=1)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header(name, files, tmp_path):
    for verb in (unpack, read):
        with pytest.raises(codec.CorruptFile):
            verb(change(files[1], **HOSTILE[name]), tmp_path)


def test_duplicate_name(files, tmp_path):
    _, packed = files
    raw = packed[8 : 8 + int.from_bytes(packed[:8], "little")]
    entry = re.search(rb'"tiny":\{[^}]*\}', raw).group()
    doubled = raw.rstrip()[:-1] + b"," + entry + b"}"
    zeroed = re.sub(rb'(header_crc32c\\":\\")[0-9a-f]{8}', rb"\g<1>00000000", doubled)
    digits = b"%08x" % crc32c(len(zeroed).to_bytes(8, "little") + zeroed)
    doubled = zeroed.replace(b'crc32c\\":\\"00000000', b'crc32c\\":\\"' + digits)
    for verb in (unpack, read):
        with pytest.raises(codec.CorruptFile, match="stands twice"):
            verb(len(doubled).to_bytes(8, "little") + doubled + packed[8 + len(raw) :], tmp_path)


@pytest.mark.parametrize("announced", [1 << 63, 100_000_001, 500])
def test_header_longer_than_the_file_or_the_limit(announced, tmp_path):
    (tmp_path / "x").write_bytes(announced.to_bytes(8, "little") + b"{}")
    for verb in (codec.pack, codec.unpack, lambda x, _: codec.safe_open(x)):
        with pytest.raises(codec.CorruptFile, match="x: not a .safetensors file"):
            verb(tmp_path / "x", tmp_path / "y")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        bytes(8),
        b"\x02" + bytes(7) + b"{}x",
        b"\x02" + bytes(7) + b"\xff\xff",
        b"\x04" + bytes(7) + "{}".encode("utf-16-le"),
    ],
)
def test_not_safetensors(data, tmp_path):
    (tmp_path / "x").write_bytes(data)
    for verb in (codec.pack, codec.unpack, lambda x, _: codec.load_file(x)):
        with pytest.raises(codec.CorruptFile, match="x: "):
            verb(tmp_path / "x", tmp_path / "y")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def mutate(packed: bytes, chance: random.Random) -> bytes:
    """The file with bytes of its header replaced, cut out, doubled or made long numbers; its checksum made right."""
    length = int.from_bytes(packed[:8], "little")
    raw = re.sub(rb'(header_crc32c\\":\\")[0-9a-f]{8}', rb"\g<1>00000000", packed[8 : 8 + length])
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(raw))
        end = min(len(raw), at + chance.choice([1, 1, 2, 8, 40]))
        new = chance.choice(
            [bytes([chance.randrange(256)]), b"", raw[at:end] * 2, b"0", b"9" * 20, b'"', b"["]
        )
        raw = raw[:at] + new + raw[end:]
    digits = b"%08x" % crc32c(len(raw).to_bytes(8, "little") + raw)
    raw = raw.replace(b'header_crc32c\\":\\"00000000', b'header_crc32c\\":\\"' + digits)
    return len(raw).to_bytes(8, "little") + raw + packed[8 + length :]


def test_mutated_headers_are_refused_or_harmless(files, tmp_path):
    original, packed = files
    expected, chance = read(original, tmp_path), random.Random(5)
    weights = {name: row[:3] for name, row in expected.items()}
    for _ in range(1500):
        try:
            found = read(mutate(packed, chance), tmp_path)
        except codec.CorruptFile:
            continue
        if any(row[2] == torch.uint8 for row in found.values()):
            continue  # it no longer says that it is packed: an ordinary file of bytes
        # A tensor may have been given another name, and the file's own metadata is text without a second copy.
        assert sorted(map(str, (row[:3] for row in found.values()))) == sorted(map(str, weights.values()))
