"""Coding of weights beside zstd, ZipNN, OpenZL and htscodecs: 64 MiB of N(0, 0.02²) and all-MiniLM-L6-v2, in bfloat16.

Speeds compare the whole pipeline from tensor to bytes or back. A fresh output buffer costs page faults as large as the
coding itself, so rows say whether the output is fresh or reused. ZipNN overwrites what it compresses: it is given a
copy each time, and the copy counts.
"""

import os
import tempfile
from pathlib import Path

import torch

import gaugekit as gk
import tensor_codecs
from gaugekit.codec.tensors.blob import encode_bytes
from gaugekit.ops.rans import operator as rans
from host_rows import block
from htscodecs import Htscodecs
from registry import Case, benchmark, own_shape

SECONDS = 0.4  # a case; all of them take two minutes on a machine that nobody else uses
TWO_THREADS_SECONDS = 1.0  # and up to eight times that where others share the cores

try:
    import zstandard
except ImportError:
    zstandard = None
try:
    import zipnn
except ImportError:
    zipnn = None


def minilm() -> dict[str, torch.Tensor]:
    """The weights in bfloat16, the rest as it is; empty where package or safetensors are not installed."""
    try:
        from safetensors.torch import load_file

        tensors = load_file(gk.samples.minilm() / "model.safetensors")
    except (ImportError, FileNotFoundError):
        return {}
    return {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}


def sample_sizes(tensor: torch.Tensor) -> dict[str, int]:
    """What a sample takes, by the slowest and smallest of zstd too; ours must not take more than any other."""
    part = tensor[: min(tensor.numel(), 1 << 21)]
    raw = part.view(torch.uint8).numpy().tobytes()
    sizes = {"sample_bytes": len(raw), "sample_coded_bytes": encode_bytes(part).numel()}
    if zstandard is not None:
        sizes["sample_coded_bytes_zstd -19"] = len(zstandard.ZstdCompressor(level=19).compress(raw))
    if zipnn is not None:
        huffman = zipnn.ZipNN(bytearray_dtype="bfloat16", threads=1)
        sizes["sample_coded_bytes_ZipNN"] = len(huffman.compress(bytes(bytearray(raw))))
    return sizes


def coding(name: str, tensor: torch.Tensor, device: str, quick: bool, threads: int = 1):
    """Encoding, decoding into a fresh tensor, decoding into a reused one."""
    raw = tensor.view(torch.uint8).numpy().tobytes()
    blob, out = encode_bytes(tensor), torch.empty_like(tensor)
    rivals = {"encode": {}, "decode": {}, "decode reused": {}}
    sizes = {"coded_bytes": blob.numel(), "bytes_before": len(raw)}
    coded = {}
    if zstandard is not None:
        compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
        coded["zstd -3"] = compressor.compress(raw)
        into = memoryview(bytearray(len(raw)))

        def zstd_into():
            with decompressor.stream_reader(coded["zstd -3"]) as reader:
                place = 0
                while got := reader.readinto(into[place:]):
                    place += got

        rivals["encode"]["zstd -3"] = lambda: compressor.compress(raw)
        rivals["decode"]["zstd -3"] = lambda: decompressor.decompress(coded["zstd -3"])
        rivals["decode reused"]["zstd -3"] = zstd_into
    if zipnn is not None:
        huffman = zipnn.ZipNN(bytearray_dtype="bfloat16", threads=1)
        coded["ZipNN"] = huffman.compress(bytes(bytearray(raw)))
        rivals["encode"]["ZipNN"] = lambda: huffman.compress(bytes(bytearray(raw)))
        rivals["decode"]["ZipNN"] = lambda: huffman.decompress(coded["ZipNN"])
    openzl = tensor_codecs.openzl()
    if openzl is not None:
        coded["OpenZL"] = openzl.encode(raw)
        rivals["encode"]["OpenZL"] = lambda: openzl.encode(raw)
        rivals["decode"]["OpenZL"] = lambda: openzl.decode(coded["OpenZL"])
    for table in rivals.values():
        table.setdefault("zstd -3", None)
    for table in (rivals["encode"], rivals["decode"]):
        table.setdefault("ZipNN", None)
        table.setdefault("OpenZL", None)
    rivals["decode"]["copy"] = tensor.clone
    rivals["decode reused"]["copy"] = lambda: out.copy_(tensor)
    sizes |= {f"coded_bytes_{name}": len(data) for name, data in coded.items()}
    samples = {} if quick else sample_sizes(tensor)

    def check():
        assert torch.equal(gk.codec.decode(blob, out=torch.zeros_like(tensor)), tensor)
        for found in (
            [size for name, size in sizes.items() if name.startswith("coded_bytes")],
            [size for name, size in samples.items() if name.startswith("sample_coded_bytes")],
        ):
            assert all(found[0] <= size for size in found), "a rival's output is smaller"

    for what, ours, label, best in (
        ("encode", lambda: encode_bytes(tensor), "fresh buffer", "ZipNN"),
        ("decode", lambda: gk.codec.decode(blob), "fresh buffer", "ZipNN"),
        ("decode reused", lambda: gk.codec.decode(blob, out=out), "reused buffer", "zstd -3"),
    ):
        yield Case(
            op="rans",
            dtype="bfloat16",
            device=device,
            check=check,
            threads=threads,
            seconds=SECONDS,
            shape=f"{what.split()[0]} {name}",
            ours=ours,
            rivals=rivals[what],
            without_us=best,
            label=label,
            bytes_moved=len(raw) + blob.numel(),
            extra=sizes | samples,
        )


def transfer(mebibytes: int, device: str):
    """A key/value cache as it would be sent: the fixed-length layout beside the entropy coder and a plain copy."""
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(mebibytes << 19, generator=generator).bfloat16().view(-1, 128).to(device)
    fixed, coded = gk.codec.encode(cache, layout="fixed"), encode_bytes(cache.cpu())

    def check():
        assert torch.equal(gk.codec.decode(fixed), cache)

    for what, ours, rans in (  # noqa: F402
        ("encode", lambda: gk.codec.encode(cache, layout="fixed"), lambda: encode_bytes(cache)),
        ("decode", lambda: gk.codec.decode(fixed), lambda: gk.codec.decode(coded)),
    ):
        yield Case(
            op="rans",
            shape=f"{what} fixed, cache of {mebibytes} MiB",
            dtype="bfloat16",
            device=device,
            ours=ours,
            rivals={"copy": cache.clone, "rans": rans},
            without_us="copy",
            check=check,
            bytes_moved=cache.nbytes + fixed.numel(),
            threads=1,
            seconds=SECONDS,
            label="fixed layout, fresh buffer",
            extra={
                "bytes_before": cache.nbytes,
                "coded_bytes": fixed.numel(),
                "coded_bytes_rans": coded.numel(),
            },
        )


def on_threads(threads: int, call):
    """``call`` on so many threads, whatever the case runs on."""

    def run():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        call()
        torch.set_num_threads(before)

    return run


def paths(name: str, tensor: torch.Tensor, device: str):
    """Each instruction set beside htscodecs on the same one; two threads beside one; exponent-and-mantissa
    beside exponent."""
    blob, out, count = encode_bytes(tensor), torch.empty_like(tensor), tensor.numel()
    values = tensor.view(torch.int16).numpy().view("uint16")
    try:
        rival = Htscodecs(values)
        rival.encode("best")
        rival.decode("best")
        assert (rival.out == values).all()
    except OSError:
        rival = None
    small = encode_bytes(tensor, symbols="exponent-and-mantissa")
    sizes = {
        "coded_bytes": blob.numel(),
        "bytes_before": 2 * count,
        "coded_bytes_exponent_and_mantissa": small.numel(),
    }
    if rival is not None:
        sizes["coded_bytes_htscodecs"] = rival.coded_bytes

    def ours(coded=blob, path=-1):
        return lambda: rans.decode(coded, 0, count, out, path)

    def beside(verb, instructions):
        return {
            f"htscodecs {instructions}": None if rival is None else lambda: getattr(rival, verb)(instructions)
        }

    def check():
        for coded, path in ((blob, -1), (blob, 1), (blob, 0), (small, -1)):
            ours(coded, path)()
            assert torch.equal(out.view(torch.int16), tensor.view(torch.int16))

    def encode(path=-1):
        rans.encode(tensor, "exponent", 17, path)

    copy = {"copy": lambda: out.copy_(tensor)}
    square = torch.ones(1024, 1024)

    def product():
        torch.mm(square, square)

    control = ("a matrix product on one thread", "a matrix product")
    on_both = dict(zip(control, (on_threads(1, product), product), strict=True))
    cases = [
        ("decode, widest", ours(), beside("decode", "best") | copy, 1),
        ("decode, AVX2", ours(path=1), beside("decode", "AVX2"), 1),
        ("decode, portable", ours(path=0), beside("decode", "scalar"), 1),
        ("decode, exponent-and-mantissa", ours(small), {"exponent": ours()} | copy, 1),
        ("decode, two threads", ours(), {"one thread": on_threads(1, ours())} | copy | on_both, 2),
        ("encode, two threads", encode, {"one thread": on_threads(1, encode)} | on_both, 2),
        ("encode, widest", encode, beside("encode", "best"), 1),
        ("encode, AVX2", lambda: encode(1), beside("encode", "AVX2"), 1),
        ("encode, portable", lambda: encode(0), beside("encode", "scalar"), 1),
    ]
    for what, call, rivals, threads in cases:
        yield Case(
            op="rans",
            shape=f"{what} {name}",
            dtype="bfloat16",
            device=device,
            ours=call,
            rivals=rivals,
            without_us=next(iter(rivals)),
            check=check,
            label="reused buffer" if "decode" in what else "fresh buffer, htscodecs' reused",
            bytes_moved=2 * count + blob.numel(),
            threads=threads,
            seconds=SECONDS if threads == 1 else TWO_THREADS_SECONDS,
            block=block(threads),
            control=control if threads == 2 else None,
            extra=sizes,
        )


def files(tensors: dict[str, torch.Tensor], device: str, folder: Path):
    """A whole checkpoint: file to file, both ways, onto the disk."""
    from safetensors.torch import save_file

    source, packed, restored, other = (
        folder / name for name in ("a.safetensors", "packed", "restored", "other")
    )
    save_file(tensors, source, metadata={"format": "pt"})
    report = gk.codec.pack(source, packed)
    sizes = {"coded_bytes": report["bytes_after"], "bytes_before": report["bytes_before"]}
    zstd_pack = zstd_unpack = None
    if zstandard is not None:

        def through(convert, read: Path, write: Path):
            with write.open("wb") as file:
                file.write(convert(read.read_bytes()))
                file.flush()
                os.fsync(file.fileno())

        def zstd_pack():
            through(zstandard.ZstdCompressor(level=3).compress, source, other)

        def zstd_unpack():
            through(zstandard.ZstdDecompressor().decompress, folder / "kept", restored)

        zstd_pack()
        other.rename(folder / "kept")
        sizes["coded_bytes_zstd -3"] = (folder / "kept").stat().st_size

    def check():
        gk.codec.unpack(packed, restored)
        assert restored.read_bytes() == source.read_bytes()

    common = {
        "op": "rans",
        "dtype": "bfloat16",
        "device": device,
        "check": check,
        "threads": 1,
        "seconds": SECONDS,
        "extra": sizes,
    }
    for what, ours, rival in (
        ("pack", lambda: gk.codec.pack(source, packed), zstd_pack),
        ("unpack", lambda: gk.codec.unpack(packed, restored), zstd_unpack),
    ):
        yield Case(
            shape=f"{what} MiniLM file",
            ours=ours,
            rivals={"zstd -3 whole file": rival},
            without_us="zstd -3 whole file",
            label="file to file, fsync",
            bytes_moved=sum(sizes[name] for name in ("coded_bytes", "bytes_before")),
            **common,
        )


@own_shape("rans", "MEBIBYTES", "64", torch.bfloat16)
def own(mebibytes: int, dtype: torch.dtype, threads: int):
    normal = (torch.randn(mebibytes << 19, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    yield from coding(f"N(0,0.02²) {mebibytes} MiB", normal, "cpu", False, threads)


@benchmark("rans")
def cases(device: str, quick: bool):
    mebibytes = 8 if quick else 64
    yield from transfer(mebibytes, device)
    generator = torch.Generator().manual_seed(0)
    normal = (torch.randn(mebibytes << 19, generator=generator) * 0.02).bfloat16()
    yield from coding(f"N(0,0.02²) {mebibytes} MiB", normal, device, quick)
    yield from paths(f"N(0,0.02²) {mebibytes} MiB", normal, device)
    if not quick:
        yield from coding("N(0,0.02²) 24 MiB", normal[: 24 << 19], device, quick)
    tensors = minilm()
    if tensors:
        weights = torch.cat([t.flatten() for t in tensors.values() if t.is_floating_point()])
        weights = weights[: 1 << 21] if quick else weights
        yield from coding("MiniLM", weights, device, quick)
        yield from paths("MiniLM", weights, device)
        with tempfile.TemporaryDirectory() as folder:
            yield from files(tensors, device, Path(folder))
