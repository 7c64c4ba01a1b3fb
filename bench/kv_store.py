"""A real model's cache, coded without loss: SmolLM2-135M reading Python's own documentation.

    python bench/kv_store.py                # some two minutes
    python bench/kv_store.py --quick        # fewer tokens, short runs
    python bench/kv_store.py --save

The model runs in float32 and its cache is rounded to bfloat16: on processors without 16-bit products that is faster.
Sizes: keys before and after their rotation (a cache holds the latter) and values, layer by layer; blocks of 16 to 256
tokens; tables calibrated on 256 tokens of another text. Speeds: whole blocks of 256 tokens, all layers, in GB/s of the
plain cache, beside zstd as it is, zstd of the bytes sorted into two planes (by NumPy; once with the sorting, once
without), and a plain copy; on one thread the
processor's time counts, on two the clock, zstd then with a block a thread. ``ratio`` is the rival's time over ours.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import zstandard

import host_rows
from gaugekit.codec import KVCodec, KVStore, KVTables
from gaugekit.text import smollm2
from registry import Case
from run import commit, machine, save, table

BLOCK_TOKENS = 256
SORTED = "zstd -1 of sorted planes"  # its part alone, whatever the sorting takes
ZSTD = {f"zstd -{level}{kind}": (level, bool(kind)) for kind in ("", ", two planes") for level in (1, 3)}


def caches(tokens: int) -> dict[str, torch.Tensor]:
    """{"keys", "values", "keys before their rotation"}: [layers, tokens, channels], and {"calibration"}: [2, layers,
    tokens, channels] of another text, all in bfloat16.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pages = list(topics.values())
    plain_keys: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda *call: plain_keys.append(call[2][0].bfloat16()))

    def read(text: str, count: int) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :count]
        with torch.no_grad():
            model.model(ids, past_key_values=cache, use_cache=True)
        parts = [
            torch.stack([getattr(layer, kind)[0] for layer in cache.layers]) for kind in ("keys", "values")
        ]
        return torch.stack([part.transpose(1, 2).flatten(2) for part in parts]).bfloat16()

    calibration = read(" ".join(pages[-8:]), BLOCK_TOKENS)
    plain_keys.clear()
    keys, values = read(" ".join(pages[:40]), tokens)
    return {
        "calibration": calibration,
        "keys": keys,
        "values": values,
        "keys before their rotation": torch.stack(plain_keys),
    }


def planes(block: torch.Tensor) -> bytes:
    """All low bytes, then all high ones, as a filter in front of a general compressor does it."""
    return np.ascontiguousarray(block.view(torch.uint8).numpy().reshape(-1, 2).T).tobytes()


def zstd_encode(block: torch.Tensor, level: int, sorted_bytes: bool) -> bytes:
    data = planes(block) if sorted_bytes else block.view(torch.uint8).numpy()
    return zstandard.ZstdCompressor(level=level).compress(data)


def zstd_restored(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def zstd_decode(data: bytes, out: torch.Tensor, sorted_bytes: bool) -> None:
    plain = np.frombuffer(zstd_restored(data), np.uint8)
    target = out.view(torch.uint8).numpy().reshape(-1)
    target[:] = plain.reshape(2, -1).T.reshape(-1) if sorted_bytes else plain


def share(coded: float, plain: torch.Tensor) -> float:
    return coded / plain.nbytes


def size_rows(cache: dict[str, torch.Tensor], tables: KVTables) -> Iterator[dict]:
    """A row for each kind and layer, and for each number of tokens: parts of the plain bytes."""
    common = {
        "op": "kv_store",
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 1,
        "label": "bytes",
        "baseline": "plain",
    }

    def shares(block: torch.Tensor, axes: str, own: KVTables | None) -> dict[str, float]:
        sizes = {
            "share": KVCodec(axes, tables=own).encode(block).numel(),
            "share_without_tables": KVCodec(axes).encode(block).numel(),
            "share_fixed": KVCodec(axes, tables=own, layout="fixed").encode(block).numel(),
        }
        sizes |= {f"share_{name}": len(zstd_encode(block, *how)) for name, how in ZSTD.items()}
        return {name: share(size, block) for name, size in sizes.items()}

    for part, kind in enumerate(("keys", "values")):
        for layer in range(cache[kind].shape[0]):
            own = KVTables(tables.shifts[part : part + 1, layer : layer + 1], torch.bfloat16)
            row = shares(cache[kind][layer].contiguous(), "SD", own)
            yield {**common, "shape": f"{kind}, layer {layer}", **row}
        own = KVTables(tables.shifts[part : part + 1], torch.bfloat16)
        yield {**common, "shape": f"{kind}, all layers", **shares(cache[kind], "LSD", own)}
    bare = cache["keys before their rotation"]
    half = bare.shape[1] // 2  # calibrated on the first half, measured on the second
    own = KVTables.calibrate(bare[:, :half], "LSD")
    yield {
        **common,
        "shape": "keys before their rotation, all layers",
        **shares(bare[:, half:].contiguous(), "LSD", own),
    }
    whole = torch.stack([cache["keys"], cache["values"]])
    for tokens in (16, 32, 64, 128, 256):
        blocks = [block.contiguous() for block in whole.split(tokens, dim=2)]
        rows = [shares(block, "PLSD", tables) for block in blocks[:: max(1, len(blocks) // 8)]]
        embedded = KVCodec(tables=tables, embed=True).encode(blocks[0]).numel()
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        yield {
            **common,
            "shape": f"blocks of {tokens} tokens",
            **mean,
            "share_with_its_tables": share(embedded, blocks[0]),
            "block_bytes": blocks[0].nbytes,
        }


def compressed(data: bytes) -> bytes:
    """By a compressor of its own: no object may be used by two threads at once."""
    return zstandard.ZstdCompressor(level=1).compress(data)


def spread(call: Callable, items: list, threads: int) -> None:
    """``call`` on each item, as many at a time as there are threads."""
    if threads == 1:
        for item in items:
            call(item)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(call, items))


def speed_cases(blocks: list[torch.Tensor], tables: KVTables, threads: int, seconds: float) -> Iterator[Case]:
    outs = [torch.empty_like(block) for block in blocks]
    size = sum(block.nbytes for block in blocks)
    places = list(range(len(blocks)))
    coded = {name: [zstd_encode(block, *how) for block in blocks] for name, how in ZSTD.items()}
    sorted_before = [planes(block) for block in blocks]

    def copy() -> None:
        for block, out in zip(blocks, outs, strict=True):
            out.copy_(block)

    for layout in ("rans", "fixed"):
        codec = KVCodec(tables=tables, layout=layout)
        data = [codec.encode(block) for block in blocks]

        def encode(codec=codec) -> None:
            for block in blocks:
                codec.encode(block)

        def decode(codec=codec, data=data) -> None:
            for item, out in zip(data, outs, strict=True):
                codec.decode(item, out)

        def check(decode=decode) -> None:
            decode()
            for block, out in zip(blocks, outs, strict=True):
                assert torch.equal(block.view(torch.int16), out.view(torch.int16))

        coding, decoding = {"copy": copy}, {"copy": copy}
        coding[SORTED] = lambda: spread(compressed, sorted_before, threads)
        decoding[SORTED] = lambda: spread(zstd_restored, coded["zstd -1, two planes"], threads)
        for name, (level, sorted_bytes) in ZSTD.items():
            coding[name] = lambda how=(level, sorted_bytes): spread(
                partial(zstd_encode, level=how[0], sorted_bytes=how[1]), blocks, threads
            )
            decoding[name] = lambda name=name, kind=sorted_bytes: spread(
                lambda i: zstd_decode(coded[name][i], outs[i], kind), places, threads
            )
        for what, ours, rivals in (("encode", encode, coding), ("decode", decode, decoding)):
            yield Case(
                op="kv_store",
                shape=f"{what}, {layout}, {len(blocks)} blocks of {BLOCK_TOKENS} tokens",
                dtype="bfloat16",
                device="cpu",
                ours=ours,
                rivals=rivals,
                without_us=tuple(ZSTD),
                check=check,
                threads=threads,
                rounds=7,
                seconds=seconds,
                block=host_rows.block(threads),
                processor_time=threads == 1,
                label="plain bytes: " + f"{size:,}",
                extra={
                    "plain_bytes": size,
                    "share": sum(item.numel() for item in data) / size,
                    **{f"share_{name}": sum(map(len, items)) / size for name, items in coded.items()},
                },
            )


def disk_cases(blocks: list[torch.Tensor], tables: KVTables, seconds: float, folder: Path) -> Iterator[Case]:
    """Through the store, every block flushed to the disk, beside plain files that are flushed too."""
    outs = [torch.empty_like(block) for block in blocks]
    store = KVStore(folder / "store", tables=tables, memory_bytes=0)
    size = sum(block.nbytes for block in blocks)

    def put() -> None:
        for place, block in enumerate(blocks):
            store.put(str(place), block)

    def get() -> None:
        for place, out in enumerate(outs):
            store.get(str(place), out)

    def write() -> None:
        for place, block in enumerate(blocks):
            with open(folder / f".{place}", "wb") as file:
                file.write(block.view(torch.uint8).numpy())
                os.fsync(file.fileno())
            os.replace(folder / f".{place}", folder / f"{place}")

    def read() -> None:
        for place, out in enumerate(outs):
            with open(folder / f"{place}", "rb") as file:
                file.readinto(out.view(torch.uint8).numpy())

    def check() -> None:
        put()
        write()
        get()
        for block, out in zip(blocks, outs, strict=True):
            assert torch.equal(block.view(torch.int16), out.view(torch.int16))

    for what, ours, rival in (
        ("put, flushed to the disk", put, write),
        ("get, from the page cache", get, read),
    ):
        yield Case(
            op="kv_store",
            shape=f"{what}, {len(blocks)} blocks of {BLOCK_TOKENS} tokens",
            dtype="bfloat16",
            device="cpu",
            ours=ours,
            rivals={"plain files": rival},
            without_us="plain files",
            check=check,
            threads=1,
            rounds=7,
            seconds=seconds,
            label="plain bytes: " + f"{size:,}",
            extra={"plain_bytes": size},
        )
    store.close()


def rated(rows: list[dict]) -> list[dict]:
    """The rows, with GB/s of the plain cache."""
    for row in rows:
        row["gb_per_s"] = row["plain_bytes"] / row["median_ms"] / 1e6
        row["baseline_gb_per_s"] = row["plain_bytes"] / row["baseline_ms"] / 1e6
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512 tokens, short runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--save", action="store_true", help="keep the rows under bench/results/")
    parser.add_argument(
        "--cache", type=Path, help="keep the model's cache in this file, or take it from there"
    )
    options = parser.parse_args()
    seconds = 0.1 if options.quick else 1.0
    if options.cache is not None and options.cache.exists():
        cache = torch.load(options.cache)
    else:
        cache = caches(512 if options.quick else 1024)
        if options.cache is not None:
            torch.save(cache, options.cache)
    tables = KVTables.calibrate(cache["calibration"])
    rows = list(size_rows(cache, tables))
    for row in rows:
        print(
            row["shape"],
            *(f"{key} {value:.4f}" for key, value in row.items() if key.startswith("share")),
            sep="  ",
        )
    whole = torch.stack([cache["keys"], cache["values"]])
    blocks = [block.contiguous() for block in whole.split(BLOCK_TOKENS, dim=2)]
    timed: list[dict] = []
    known: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            for case in speed_cases(blocks, tables, threads, seconds):
                timed += rated(host_rows.measure(case, seconds, known))
        for case in disk_cases(blocks, tables, seconds, Path(folder)):
            timed += rated(host_rows.measure(case, seconds, known))
    print(machine("cpu"))
    print(table(timed))
    if options.save:
        where = {"machine": machine("cpu"), "commit": commit()}
        print(save([row | where for row in rows + timed], "kv_store", "cpu"))


if __name__ == "__main__":
    main()
