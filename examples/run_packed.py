"""Generates text ids with a Llama-shaped model twice, plain and packed, and shows memory and speed side by side.

    python examples/run_packed.py            # a model of about 1.1 billion weights, random but of realistic scale
    python examples/run_packed.py --quick    # a small one

The weights are random, so the text means nothing; the tokens show that both models decide alike.
"""

import argparse
import tempfile
import time

import torch
import transformers

import gaugekit as gk
from gaugekit.integrations.transformers import GaugekitConfig

SIZES = {
    True: dict(vocab_size=4000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
               num_attention_heads=8, num_key_value_heads=4),
    False: dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                num_attention_heads=32, num_key_value_heads=4),
}  # fmt: skip


def weight_bytes(model) -> int:
    """Memory of parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values())


def generate(model, tokens: int) -> tuple[list[int], float]:
    """The tokens after a prompt of eight, and how many a second."""
    ids = torch.arange(8)[None]
    options = dict(do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
    model.generate(ids, max_new_tokens=2, **options)
    begin = time.perf_counter()
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return out[0, 8:].tolist(), tokens / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model")
    quick = parser.parse_args().quick
    config = transformers.LlamaConfig(**SIZES[quick], dtype=torch.bfloat16)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
        packed = {"quantization_config": GaugekitConfig(packed=True)}
        results = {}
        for name, options in (("plain", {}), ("packed", packed)):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, attn_implementation="sdpa", **options
            ).eval()
            tokens, speed = generate(model, 8 if quick else 16)
            results[name] = (weight_bytes(model), speed, tokens)
            print(f"{name:7} {results[name][0] / 1e6:9,.1f} MB   {speed:6.2f} tokens/s   {tokens[:8]}")
            del model
    (plain, slow, first), (small, fast, second) = results["plain"], results["packed"]
    print(
        f"memory {small / plain:.3f} of plain, speed {fast / slow:.2f} times, same tokens: {first == second}"
    )
    kernel = "C++" if gk._library.implementation("packed_linear") else "composition of torch operators (slow)"
    print(f"product: {kernel}")


if __name__ == "__main__":
    main()
