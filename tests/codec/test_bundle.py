"""Packed files of version 2: the original's header compressed behind the tensors, where listing them would not pay."""

import json
import random
import tracemalloc
import zlib

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from gaugekit import codec
from gaugekit.codec.files import bundle, container
from gaugekit.reference.rans import crc32c

WEIGHT = (torch.randn(30, 700, generator=torch.Generator().manual_seed(9)) * 0.02).bfloat16()


def words(count: int) -> str:
    chance = random.Random(3)
    return json.dumps({f"tag {chance.random()}": chance.randint(1, 999) for _ in range(count)})


FILES = {  # tensors, metadata, whether the file's own header can list them
    "an ordinary model": ({f"layer.{i}.weight": WEIGHT for i in range(9)}, {"format": "pt"}, True),
    "much metadata": ({f"lora.{i}": WEIGHT[:1] for i in range(20)}, {"tags": words(2000)}, False),
    "many small tensors": ({f"layer.{i}.scale": torch.tensor([i]) for i in range(2000)}, None, False),
    "many small tensors that could be coded": (
        {f"{i}": WEIGHT[0, :60].clone() for i in range(700)},
        None,
        False,
    ),
    "spaces": ({"w": WEIGHT[:3]}, {"spaces": " " * 500_000}, False),
    "a key of our name": ({"w": WEIGHT}, {"gaugekit": "header_crc32c"}, False),
    "no tensors": ({}, {"tags": words(300)}, False),
    "noise": ({"noise": torch.randint(0, 255, (9000,), dtype=torch.uint8)}, None, True),
}


@pytest.mark.parametrize("name", [container.CHAIN, bundle.TENSORS, bundle.HEADER])
@pytest.mark.parametrize("size", [3, 5000])
def test_a_tensor_may_have_one_of_our_names(tmp_path, name, size):
    tensor = torch.arange(size, dtype=torch.int32).to(torch.uint8)
    save_file({name: tensor}, tmp_path / "a")
    codec.pack(tmp_path / "a", tmp_path / "b", verify=True)
    codec.unpack(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    assert torch.equal(codec.load_file(tmp_path / "b")[name], tensor)


@pytest.mark.parametrize("name", FILES)
def test_nothing_grows_and_everything_comes_back(tmp_path, name):
    tensors, metadata, listed = FILES[name]
    plain, packed = tmp_path / "a", tmp_path / "b"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, plain, metadata)
    report = codec.pack(plain, packed, verify=True)
    assert report["bytes_after"] == packed.stat().st_size <= 1.01 * plain.stat().st_size + 4096
    with safetensors.safe_open(packed, "pt") as file:  # any reader can open it
        own = {bundle.TENSORS, bundle.HEADER}
        assert set(file.keys()) == (set(tensors) if listed else own)
    unpacked = codec.unpack(packed, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == plain.read_bytes()
    assert unpacked["bytes_before"] == packed.stat().st_size
    with codec.safe_open(packed) as ours, safetensors.safe_open(plain, "pt") as theirs:
        assert ours.packed and ours.metadata() == theirs.metadata() == metadata
        assert ours.keys() == theirs.keys() and ours.offset_keys() == theirs.offset_keys()
        for key in ours.keys()[:30]:
            assert torch.equal(ours.get_tensor(key), tensors[key])
            assert torch.equal(ours.get_slice(key)[:1], tensors[key][:1])
    codec.save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "d", metadata)
    assert (tmp_path / "d").read_bytes() == packed.read_bytes()


@pytest.mark.parametrize(
    "metadata",
    [
        {"gaugekit": "1"},
        {"gaugekit": ""},
        {"gaugekit": '{"header_crc32c":"00000000"}'},
        {"gaugekit": json.dumps({"version": 1}), "z": "x"},
        {"note": "header_crc32c", "format": "pt"},
    ],
)
def test_ordinary_files_may_say_our_name(tmp_path, metadata):
    save_file({"w": WEIGHT, "gaugekit": torch.arange(3)}, tmp_path / "a", metadata)
    codec.pack(tmp_path / "a", tmp_path / "b")
    for name, packed in (("a", False), ("b", True)):
        with codec.safe_open(tmp_path / name) as file:
            assert file.packed == packed and file.metadata() == metadata
            assert torch.equal(file.get_tensor("w"), WEIGHT)
    codec.unpack(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_metadata_of_a_packed_file_on_another_is_no_ordinary_file(tmp_path):
    """Some tool wrote the coded bytes as tensors, and the metadata as it was: that is not what the tensors were."""
    save_file({"w": WEIGHT}, tmp_path / "a")
    codec.pack(tmp_path / "a", tmp_path / "b")
    with safetensors.safe_open(tmp_path / "b", "pt") as file:
        metadata, coded = file.metadata(), file.get_tensor("w")
    save_file({"w": coded}, tmp_path / "c", {"a": "b", **metadata})
    with pytest.raises(codec.CorruptFile):
        codec.safe_open(tmp_path / "c")


def test_a_header_too_long_to_be_listed(tmp_path, monkeypatch):
    """What safetensors could not read any more is not written; the limit is lowered to keep the test small."""
    tensors = {f"layer.{i}.weight": WEIGHT[:10].clone() for i in range(40)}
    save_file(tensors, tmp_path / "a")
    codec.pack(tmp_path / "a", tmp_path / "b")
    length = int.from_bytes((tmp_path / "b").read_bytes()[:8], "little")
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", length - 1)
    codec.pack(tmp_path / "a", tmp_path / "c")
    assert int.from_bytes((tmp_path / "c").read_bytes()[:8], "little") == bundle.START - 8
    codec.unpack(tmp_path / "c", tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == (tmp_path / "a").read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An original of a coded tensor, raw ones and an empty one, and its packed file of version 2."""
    folder = tmp_path_factory.mktemp("bundle")
    tensors = {"weight": WEIGHT[0].clone(), "ids": torch.arange(5), "none": torch.zeros(0, 2)}
    save_file(tensors, folder / "a", {"gaugekit": "mine"})
    codec.pack(folder / "a", folder / "b")
    return (folder / "a").read_bytes(), (folder / "b").read_bytes()


def attempt(data: bytes, folder) -> bytes:
    """What unpacking gives; after an error, nothing."""
    (folder / "in").write_bytes(data)
    try:
        codec.unpack(folder / "in", folder / "out")
    except codec.CorruptFile:
        assert not (folder / "out").exists()
        raise
    return (folder / "out").read_bytes()


def test_every_flipped_byte_and_every_truncation_is_detected(files, tmp_path):
    original, packed = files
    assert attempt(packed, tmp_path) == original
    (tmp_path / "out").unlink()
    header = json.loads(packed[8 : bundle.START])
    begin, end = (bundle.START + offset for offset in header[bundle.HEADER]["data_offsets"])
    assert end == len(packed)
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 0x15
        in_tensors = bundle.START <= place < begin
        if in_tensors and place % 16:
            continue
        (tmp_path / "in").write_bytes(damaged)
        with pytest.raises(codec.CorruptFile):
            attempt(bytes(damaged), tmp_path) if in_tensors else codec.safe_open(tmp_path / "in")
    for size in range(0, len(packed), 7):
        (tmp_path / "in").write_bytes(packed[:size])
        with pytest.raises(codec.CorruptFile):
            codec.safe_open(tmp_path / "in")


def rebuilt(packed: bytes, section=None, inner=None, entries=None) -> bytes:
    """The file with its section, gaugekit entry or list of sections changed, and every checksum made right."""
    length = int.from_bytes(packed[:8], "little")
    header = json.loads(packed[8 : 8 + length])
    entry = json.loads(header["__metadata__"]["gaugekit"])
    begin, end = header[bundle.HEADER]["data_offsets"]
    data, stored = packed[8 + length :][:begin], packed[8 + length :][begin:end]
    if section:
        plain = section(zlib.decompress(stored) if entry["header"][0] == "zlib" else stored, entry)
        stored = plain if entry["header"][0] == "raw" else zlib.compress(plain)
        header[bundle.HEADER] = {
            "dtype": "U8",
            "shape": [len(stored)],
            "data_offsets": [begin, begin + len(stored)],
        }
    entry["header"][2] = crc32c(stored)
    if inner:
        inner(entry)
    if entries:
        entries(header)
    entry["header_crc32c"] = "00000000"
    header["__metadata__"]["gaugekit"] = json.dumps(entry, separators=(",", ":"))
    raw = json.dumps(header, separators=(",", ":")).encode()
    digits = b"%08x" % crc32c(len(raw).to_bytes(8, "little") + raw)
    raw = raw.replace(b'header_crc32c\\":\\"00000000', b'header_crc32c\\":\\"' + digits)
    return len(raw).to_bytes(8, "little") + raw + data + stored


def at(offset: int, new: bytes):
    """Bytes of the section's table, counted from its end, replaced."""
    return {
        "section": lambda plain, entry: (
            plain[: len(plain) - offset] + new + plain[len(plain) - offset + len(new) :]
        )
    }


def longer(plain, entry):
    entry["header"][1] += 1
    return plain[: entry["header"][1] - 1] + b" " + plain[entry["header"][1] - 1 :]


def other_header(old: bytes, new: bytes):
    def change(plain, entry):
        changed = plain[: entry["header"][1]].replace(old, new) + plain[entry["header"][1] :]
        entry["header"][1] += len(changed) - len(plain)
        return changed

    return {"section": change}


HOSTILE = {  # the table of three tensors: 12 bytes of order, 3 of codecs, 8 of sizes, 12 of checksums
    "version 3": {"inner": lambda e: e.update(version=3)},
    "unknown method": {"inner": lambda e: e["header"].__setitem__(0, "zstd")},
    "method a list": {"inner": lambda e: e["header"].__setitem__(0, [])},
    "raw that is zlib": {"inner": lambda e: e["header"].__setitem__(0, "raw")},
    "a header of nothing": {"inner": lambda e: e["header"].__setitem__(1, 0)},
    "a header too long": {"inner": lambda e: e["header"].__setitem__(1, 100_000_001)},
    "more tensors": {"inner": lambda e: e.update(tensors=4)},
    "2^40 tensors": {"inner": lambda e: e.update(tensors=1 << 40)},
    "tensors a list": {"inner": lambda e: e.update(tensors=[])},
    "no header": {"inner": lambda e: e.pop("header") and e.update(header={"a": 1})},
    "a tensor twice": at(35, b"\0" * 12),
    "a tensor beyond": at(35, b"\xff" * 4),
    "an unknown codec": at(23, b"\2"),
    "none coded": at(23, b"\0\0\0"),
    "size of 2^63": at(20, b"\xff" * 8),
    "size of 0": at(20, b"\0" * 8),
    "a checksum": at(12, b"\1\2\3\4"),
    "a byte more": {"section": lambda plain, entry: plain + b"\0"},
    "a byte less": {"section": lambda plain, entry: plain[:-1]},
    "nothing": {"section": lambda plain, entry: b""},
    "another dtype": other_header(b'"BF16"', b'"F16"'),
    "another shape": other_header(b"[700]", b"[100,7]"),
    "deep JSON": other_header(b'"BF16"', b"[" * 50_000),
    "a long number": other_header(b"[700]", b"[" + b"9" * 5000 + b"]"),
    "no Unicode": other_header(b'"mine"', b'"\\ud800"'),
    "sections exchanged": {
        "entries": lambda h: h.update({bundle.TENSORS: h[bundle.HEADER], bundle.HEADER: h[bundle.TENSORS]})
    },
    "another name": {"entries": lambda h: h.update(other=h.pop(bundle.TENSORS))},
}


def test_rebuilding_nothing_is_sound(files, tmp_path):
    assert attempt(rebuilt(files[1]), tmp_path) == files[0]
    (tmp_path / "out").unlink()
    assert attempt(rebuilt(files[1], section=longer), tmp_path) != files[0]  # another header, as sound


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(files, tmp_path, name):
    data = rebuilt(files[1], **HOSTILE[name])
    with pytest.raises(codec.CorruptFile):
        attempt(data, tmp_path)


def test_a_bomb_is_refused_before_it_unfolds(files, tmp_path):
    """20 MB of spaces in 20 KB: what the file does not justify is never allocated."""

    def bomb(plain, entry):
        spaces = 20_000_000
        entry["header"][1] += spaces
        return plain[: entry["header"][1] - spaces] + b" " * spaces + plain[entry["header"][1] - spaces :]

    data = rebuilt(files[1], section=bomb)
    assert len(data) < 40_000
    (tmp_path / "in").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(codec.CorruptFile, match="zlib stream"):
        codec.safe_open(tmp_path / "in")
    assert tracemalloc.get_traced_memory()[1] < 2 * (bundle.MAX_RATIO + 3) * len(data)
    tracemalloc.stop()


def test_random_sections_are_refused_or_sound(files, tmp_path):
    """Bytes of the table replaced, cut out or doubled, its checksum made right."""
    chance = random.Random(5)

    def mutated(plain, entry):
        place = chance.randrange(len(plain))
        end = min(len(plain), place + chance.choice([1, 1, 2, 8, 40]))
        return plain[:place] + chance.choice([b"", b"\xff", bytes(8), plain[place:end] * 2]) + plain[end:]

    for _ in range(300):
        (tmp_path / "in").write_bytes(rebuilt(files[1], section=mutated))
        try:
            with codec.safe_open(tmp_path / "in") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        except ValueError:
            continue


def test_a_section_that_would_not_be_read_is_not_compressed():
    section = bundle.Section(b" " * 100_000, *(np.zeros(0, dtype) for dtype in ("u4", bool, "u8", "u4")))
    assert bundle.render(section) == ("raw", section.header)
    method, small = bundle.render(
        bundle.Section(words(500).encode(), *[np.zeros(0, t) for t in ("u4", bool, "u8", "u4")])
    )
    assert method == "zlib" and bundle.parse(method, small, len(words(500)), 0).header == words(500).encode()
