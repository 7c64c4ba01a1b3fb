"""Generates text ids with a Llama-shaped model twice, plain and packed, and shows memory and speed side by side.

    python examples/run_packed.py                 # 1.1 billion weights (TinyLlama's shape), random, of realistic scale
    python examples/run_packed.py --threads 1 2   # with one thread, then with two
    python examples/run_packed.py --quick         # a small one

The weights are N(0, 0.02²), so the text means nothing; the tokens show that both models decide alike. The head is a
matrix of its own, not the embedding's. Both models take turns, in turning order; a speed is the median over the rounds,
of the tokens after the first: one row of x a product, bound by memory.
"""

import argparse
import statistics
import tempfile
import time

import torch
import transformers

import gaugekit as gk
from gaugekit.checkpoint.resident import held_bytes
from gaugekit.integrations.transformers import GaugekitConfig

SIZES = {
    "small": dict(vocab_size=4000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
                  num_attention_heads=8, num_key_value_heads=4),
    "1b": dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
               num_attention_heads=32, num_key_value_heads=4),
}  # fmt: skip


class Clock(transformers.generation.BaseStreamer):
    """Notes when each token came."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def generate(model, tokens: int) -> tuple[list[int], float]:
    """The tokens after a prompt of eight, and how many came a second after the first."""
    ids, clock = torch.arange(8)[None], Clock()
    options = dict(do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0, streamer=clock)
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    first, last = clock.times[1], clock.times[-1]  # the prompt itself is put first
    return out[0, 8:].tolist(), (tokens - 1) / (last - first)


def compare(models: dict, tokens: int, rounds: int) -> tuple[dict[str, float], float, bool]:
    """Tokens a second of each model, the ratio of a round's speeds, and whether all tokens agreed; medians."""
    speeds, texts, order = {name: [] for name in models}, [], list(models)
    for _ in range(rounds):
        for name in order:
            text, speed = generate(models[name], tokens)
            speeds[name].append(speed)
            texts.append(text)
        order.reverse()
    ratio = statistics.median(b / a for a, b in zip(speeds["plain"], speeds["packed"], strict=True))
    medians = {name: statistics.median(rates) for name, rates in speeds.items()}
    return medians, ratio, all(text == texts[0] for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, few tokens")
    parser.add_argument("--size", choices=SIZES, help="default: 1b, and small with --quick")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    arguments = parser.parse_args()
    size = arguments.size or ("small" if arguments.quick else "1b")
    config = transformers.LlamaConfig(**SIZES[size], dtype=torch.bfloat16)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    plain = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        plain.save_pretrained(directory)
        begin = time.perf_counter()
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="sdpa", quantization_config=GaugekitConfig(packed=True)
        ).eval()
        seconds = time.perf_counter() - begin
    models = {"plain": plain, "packed": packed}
    held = {name: held_bytes(model) for name, model in models.items()}
    kernel = "C++" if gk._library.implementation("packed_linear") else "composition of torch operators (slow)"
    print(f"product: {kernel}; loaded and packed in {seconds:.1f} s")
    for name, total in held.items():
        print(f"{name:7} {total / 1e6:9,.1f} MB")
    print(f"memory {held['packed'] / held['plain']:.3f} of plain")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        speeds, ratio, same = compare(models, 8 if arguments.quick else 12, 3 if arguments.quick else 5)
        speed = ", ".join(f"{name} {rate:.2f} tokens/s" for name, rate in speeds.items())
        print(f"{threads} threads: {speed}: {ratio:.2f} times as fast, same tokens: {same}")


if __name__ == "__main__":
    main()
