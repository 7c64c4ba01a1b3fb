"""pack and unpack: files and directories restored byte for byte, nothing written over, nothing left
behind.
"""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gaugekit as gk


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.02

    return {
        "weight.bf16": normal(40, 300).bfloat16(),
        "weight.fp16": normal(5000).half(),
        "weight.fp32": normal(33, 111),
        "noise.fp32": torch.randint(
            -(2**31), 2**31 - 1, (2000,), generator=generator, dtype=torch.int32
        ).view(torch.float32),
        "tiny": normal(3).bfloat16(),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(77),
        "mask": torch.tensor([True, False, True]),
        "wide": normal(9).double(),
        'ünicode "quoted" 名': normal(600).bfloat16(),
    }


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt", "note": 'with "quotes" and ünicode'})
    return path


def test_file_comes_back_byte_for_byte(source, tmp_path):
    before = sha256(source)
    packed, restored = tmp_path / "packed.safetensors", tmp_path / "restored.safetensors"
    report = gk.codec.pack(source, packed)
    assert report["bytes_before"] == source.stat().st_size
    assert report["bytes_after"] == packed.stat().st_size < source.stat().st_size
    assert report["ratio"] == packed.stat().st_size / source.stat().st_size
    weights = sum(t.numel() for t in tensors().values())
    assert report["bits_per_weight"] == 8 * packed.stat().st_size / weights
    assert list(report.fields) == [
        "bytes_before", "bytes_after", "ratio", "bits_per_weight", "verified", "seconds"
    ]  # fmt: skip
    json.loads(report.json())

    report = gk.codec.unpack(packed, restored)
    assert (report["bytes_before"], report["bytes_after"]) == (packed.stat().st_size, source.stat().st_size)
    assert set(report.fields) == {"bytes_before", "bytes_after", "seconds"}
    assert sha256(restored) == sha256(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.safetensors",
        "packed.safetensors",
        "restored.safetensors",
    ]


def test_packed_file_is_a_safetensors_file(source, tmp_path):
    packed = tmp_path / "packed.safetensors"
    gk.codec.pack(source, packed)
    stored = load_file(packed)
    assert set(stored) == set(tensors())
    for name, tensor in tensors().items():
        if stored[name].dtype == torch.uint8:
            assert torch.equal(gk.codec.decode(stored[name]), tensor)
        else:
            assert (
                torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))
                if tensor.dim()
                else True
            )
    assert (
        stored["weight.bf16"].dtype
        == stored["weight.fp16"].dtype
        == stored["weight.fp32"].dtype
        == torch.uint8
    )
    assert stored["noise.fp32"].dtype == torch.float32 and stored["ids"].dtype == torch.int64
    with safe_open(packed, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata["gaugekit"])["version"] == 1


def test_data_and_blobs_are_aligned(source, tmp_path):
    packed = tmp_path / "packed.safetensors"
    gk.codec.pack(source, packed)
    data = packed.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    coded = {
        n
        for n, (c, _) in json.loads(header.pop("__metadata__")["gaugekit"])["tensors"].items()
        if c == "rans"
    }
    assert (8 + length) % 16 == 0 and coded == {
        "weight.bf16",
        "weight.fp16",
        "weight.fp32",
        'ünicode "quoted" 名',
    }
    sizes = {"BOOL": 1, "I64": 8, "F64": 8, "F32": 4, "BF16": 2, "F16": 2}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert begin % (16 if name in coded else sizes[entry["dtype"]]) == 0
        if name in coded:
            assert data[8 + length + begin :].startswith(b"GKRANS\x1a\n") and (end - begin) % 16 == 0


@pytest.mark.parametrize("layout", ["empty", "no metadata", "spaces after the header"])
def test_unusual_files(layout, tmp_path):
    source = tmp_path / "a.safetensors"
    save_file({} if layout == "empty" else {"x": torch.arange(5.0)}, source)
    if layout.startswith("spaces"):
        data = source.read_bytes()
        length = int.from_bytes(data[:8], "little")
        source.write_bytes(
            (length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :]
        )
    report = gk.codec.pack(source, tmp_path / "b.safetensors")
    gk.codec.unpack(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert sha256(tmp_path / "c.safetensors") == sha256(source)
    size = (tmp_path / "b.safetensors").stat().st_size
    assert report["bits_per_weight"] == (0 if layout == "empty" else 8 * size / 5)


def test_directory(source, tmp_path):
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    source.rename(model / "model-00001-of-00002.safetensors")
    save_file({"x": torch.zeros(4000)}, model / "sub" / "x.safetensors")
    (model / "config.json").write_text('{"a": 1}')
    (tmp_path / "elsewhere").write_bytes(b"linked")
    os.symlink(tmp_path / "elsewhere", model / "tokenizer.json")  # as in a Hugging Face cache
    seen = []
    report = gk.codec.pack(
        model, tmp_path / "packed", progress=lambda done, total: seen.append((done, total))
    )
    assert (tmp_path / "packed" / "config.json").read_text() == '{"a": 1}'
    assert (tmp_path / "packed" / "tokenizer.json").read_bytes() == b"linked"
    assert report.notes == ["2 other files were copied as they are."]
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1
    gk.codec.unpack(tmp_path / "packed", tmp_path / "restored")
    for path in model.rglob("*"):
        if path.is_file():
            assert sha256(tmp_path / "restored" / path.relative_to(model)) == sha256(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "model", "packed", "restored"]


def test_progress_of_a_file(source, tmp_path):
    seen = []
    gk.codec.pack(source, tmp_path / "p.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (source.stat().st_size,) * 2 and len(seen) == len(tensors())


def refused(match, *arguments, verb=gk.codec.pack):
    with pytest.raises(ValueError, match=match) as caught:
        verb(*arguments)
    assert not isinstance(caught.value, gk.codec.CorruptFile)


def test_refusals(source, tmp_path):
    before = sha256(source)
    packed = tmp_path / "packed.safetensors"
    gk.codec.pack(source, packed)
    directory = tmp_path / "model"
    directory.mkdir()
    refused("found none", directory, tmp_path / "out")
    gk.codec.pack(source, directory / "m.safetensors")
    refused("does not exist", tmp_path / "absent", tmp_path / "out")
    refused("another path than source", source, source)
    refused("another path than source", source, tmp_path / "model" / ".." / source.name)
    os.link(source, tmp_path / "link.safetensors")
    refused("another path than source", source, tmp_path / "link.safetensors")
    refused("expected a file name", source, directory)
    refused("packed already", packed, tmp_path / "out")
    refused("m.safetensors is packed already", directory, tmp_path / "out")
    refused("ordinary .safetensors", source, tmp_path / "out", verb=gk.codec.unpack)
    refused("beside the source", directory, directory / "inside")
    refused("another path than source", directory, directory)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("new or empty directory", directory, tmp_path / "full", verb=gk.codec.unpack)
    assert sha256(source) == before
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial"))


def test_failure_leaves_nothing(source, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    (tmp_path / "d").mkdir()
    target = tmp_path / "d" / "p.safetensors"
    target.write_bytes(b"an earlier result")
    with pytest.raises(KeyboardInterrupt):
        gk.codec.pack(source, target, progress=stop)
    assert target.read_bytes() == b"an earlier result"
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["p.safetensors"]
    with pytest.raises(KeyboardInterrupt):
        gk.codec.unpack(tmp_path / "d", tmp_path / "e", progress=stop) if gk.codec.pack(
            source, target
        ) else None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "e.partial", "model.safetensors"]
    gk.codec.unpack(tmp_path / "d", tmp_path / "e")  # goes on
    assert sha256(tmp_path / "e" / "p.safetensors") == sha256(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "e", "model.safetensors"]


def test_disk_space_is_checked_first(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("gaugekit.files.places.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="are needed beside p.safetensors, 1,000 are free") as caught:
        gk.codec.pack(source, tmp_path / "p.safetensors")
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_permissions_follow_the_source(source, tmp_path):
    source.chmod(0o640)
    gk.codec.pack(source, tmp_path / "p.safetensors")
    assert stat.S_IMODE((tmp_path / "p.safetensors").stat().st_mode) == 0o640
