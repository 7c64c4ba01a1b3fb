"""On a GPU: chunks of coded weights decoded in one launch, beside a copy of what comes out.

A bfloat16 moves 3.32 bytes when it is decoded (1.32 in, 2 out), so no decoder is faster than the copy's bandwidth over
3.32; ``share_of_peak`` is the share of that. Every tensor has coded bytes of its own: none is found in a cache.
"""

import torch

import gaugekit as gk
from gaugekit.codec.tensors.blob import encode_bytes
from gaugekit.ops.rans.rows import decode_rows, rows_of
from registry import Call, Planned, benchmark


def coded(tensor: torch.Tensor, count: int, device: str, symbols=None):
    """``count`` copies of the coded tensor one behind the other, and the rows that decode them side by side."""
    blob = encode_bytes(tensor, symbols=symbols)
    step = -(-blob.numel() // 16) * 16
    packed = torch.zeros(count * step, dtype=torch.uint8)
    packed.view(count, step)[:, : blob.numel()] = blob
    first = rows_of(blob, 0, tensor.numel(), 0, 0)
    rows = first[None].repeat(count, 0)
    rows["in"] += (torch.arange(count) * step)[:, None].numpy().astype("uint64")
    rows["out"] += (torch.arange(count) * tensor.nbytes)[:, None].numpy().astype("uint64")
    rows = torch.from_numpy(rows.reshape(-1).view("uint8").copy())
    return packed.to(device), rows.to(device), blob.numel()


def normal(elements: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(elements, generator=generator) * 0.02).bfloat16()


def decoding(name: str, elements: int, count: int, device: str, symbols=None, goal=None):
    """``count`` tensors of so many elements in one launch."""

    def make():
        tensor = normal(elements)
        packed, rows, coded_bytes = coded(tensor, count, device, symbols)
        out = torch.zeros(count * tensor.nbytes, dtype=torch.uint8, device=device)
        damaged = torch.ones(rows.numel() // 48, dtype=torch.int32, device=device)
        source = tensor.view(torch.uint8).repeat(count).to(device)

        def check():
            decode_rows(packed, rows, out, damaged)
            assert not damaged.any() and torch.equal(out, source)

        return {
            "ours": Call(decode_rows, (packed, rows, out, damaged)),
            "rivals": {"copy": Call(torch.Tensor.copy_, (out, source))},
            "without_us": "copy",
            "check": check,
            "bytes_moved": count * (coded_bytes + tensor.nbytes),
            "goal": goal,
            "extra": {
                "coded_bytes": count * coded_bytes,
                "bytes_before": count * tensor.nbytes,
                "chunks": rows.numel() // 48,
            },
        }

    label = "one launch, reused buffer" + ("" if symbols is None else f", {symbols}")
    return Planned("rans", f"decode {name}", "bfloat16", make, label, device)


def fixed(way: str, mebibytes: int, device: str):
    """A key/value cache as it would be sent, in the fixed layout, beside a plain copy."""

    def make():
        cache = torch.randn(mebibytes << 19, device=device).bfloat16().view(-1, 128)
        sent = gk.codec.encode(cache, layout="fixed")

        def check():
            assert torch.equal(gk.codec.decode(sent), cache)

        ours = Call(lambda x: gk.codec.encode(x, layout="fixed"), (cache,))
        return {
            "ours": ours if way == "encode" else Call(gk.codec.decode, (sent,)),
            "rivals": {"copy": Call(torch.clone, (cache,))},
            "without_us": "copy",
            "check": check,
            "bytes_moved": cache.nbytes + sent.numel(),
            "extra": {"bytes_before": cache.nbytes, "coded_bytes": sent.numel()},
        }

    shape = f"{way} fixed, cache of {mebibytes} MiB"
    return Planned("rans", shape, "bfloat16", make, "fixed layout, fresh buffer", device)


@benchmark("rans", device="cuda")
def cases(device: str, quick: bool):
    square = 1 << (18 if quick else 24)
    side = int(square**0.5)
    count = 2 if quick else 16  # 512 MiB of output
    goal = ("share_of_peak", 0.8)
    yield decoding(f"{count} tensors {side}x{side}", square, count, device, goal=goal)
    yield decoding(f"one tensor {side}x{side}", square, 1, device)
    yield decoding(f"{count} tensors {side}x{side}", square, count, device, symbols="exponent-and-mantissa")
    for way in ("encode", "decode"):
        yield fixed(way, 4 if quick else 64, device)
