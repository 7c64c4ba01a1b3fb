"""Generates text ids with a model twice, plain and packed, and shows memory and speed side by side.

    python examples/run_packed.py                 # 1.1 billion weights (TinyLlama's shape), random, of realistic scale
    python examples/run_packed.py --threads 1 2   # with one thread, then with two
    python examples/run_packed.py --size experts  # a mixture of 0.8 billion weights (Mixtral's shape), 2 of 8 experts
    python examples/run_packed.py --quick         # small ones

The weights are N(0, 0.02²), so the text means nothing; the tokens show that both models decide alike. The head is a
matrix of its own, not the embedding's. Both models take turns, in turning order; a speed is the median over the rounds,
of the tokens after the first: one row of x a product, bound by memory. The plain mixture runs by the fastest here of
transformers' experts implementations, measured first; the packed one decodes the experts that a token is routed to.
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
    "small-experts": dict(vocab_size=4000, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                          num_attention_heads=8, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2),
    "experts": dict(vocab_size=16000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=8,
                    num_attention_heads=16, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2),
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


def settle(model, tokens: int) -> str:
    """Sets the experts implementation of the plain ``model`` that generates fastest here, and returns its name."""
    speeds = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        speeds[name] = max(generate(model, tokens)[1] for _ in range(2))
    best = max(speeds, key=speeds.get)
    model.set_experts_implementation(best)
    return best


def run(size: str, threads: list[int], quick: bool) -> None:
    """Makes the model, loads it packed, and prints memory and speed of both."""
    experts = "num_local_experts" in SIZES[size]
    kind = transformers.MixtralForCausalLM if experts else transformers.LlamaForCausalLM
    torch.manual_seed(0)
    plain = kind(kind.config_class(**SIZES[size], dtype=torch.bfloat16)).eval()
    with tempfile.TemporaryDirectory() as directory:
        plain.save_pretrained(directory)
        begin = time.perf_counter()
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="sdpa", quantization_config=GaugekitConfig(packed=True)
        ).eval()
        seconds = time.perf_counter() - begin
    models = {"plain": plain, "packed": packed}
    held = {name: held_bytes(model) for name, model in models.items()}
    print(f"{size}: {plain.num_parameters():,} weights; loaded and packed in {seconds:.1f} s")
    for name, total in held.items():
        print(f"{name:7} {total / 1e6:9,.1f} MB")
    print(f"memory {held['packed'] / held['plain']:.3f} of plain")
    for count in threads:
        torch.set_num_threads(count)
        best = f" ({settle(plain, 4)})" if experts else ""
        speeds, ratio, same = compare(models, 8 if quick else 12, 3 if quick else 5)
        speed = f"plain{best} {speeds['plain']:.2f} tokens/s, packed {speeds['packed']:.2f} tokens/s"
        print(f"{count} threads: {speed}: {ratio:.2f} times as fast, same tokens: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, few tokens")
    parser.add_argument("--size", choices=SIZES, help="default: 1b; with --quick small, then small-experts")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.bfloat16)
    kernel = "C++" if gk._library.implementation("packed_linear") else "composition of torch operators (slow)"
    print(f"product: {kernel}")
    sizes = [arguments.size] if arguments.size else ["small", "small-experts"] if arguments.quick else ["1b"]
    for size in sizes:
        run(size, arguments.threads, arguments.quick)


if __name__ == "__main__":
    main()
