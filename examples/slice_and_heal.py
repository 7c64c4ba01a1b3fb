"""A language model cut to three quarters of its width, then healed: what it loses, and what it wins back.

1. The perplexity of SmolLM2-135M-Instruct on a part of Python's documentation.
2. Its residual stream cut by a quarter (SliceGPT), the directions to keep taken from the rest of that text, and the
   rotations between layers stored as I − Y Yᵀ, the smallest of their exact forms.
3. All of it but the embeddings trained towards what the model as it was foretells, on the same rest.

The sliced and the healed model are Hugging Face directories (into build/slice_and_heal, or --out), which load after
``import gaugekit.integrations.transformers``. A second call goes on where the first was stopped.

    python examples/slice_and_heal.py            # an hour or so on two cores, nearly all of it healing
    python examples/slice_and_heal.py --quick    # seconds: a tiny model takes the same way
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import gaugekit as gk
import gaugekit.integrations.transformers  # sliced directories load once this is imported
from gaugekit import samples
from gaugekit.progress import bar

MEASURED = 60_000  # characters of the text, the first ones: neither slicing nor healing sees them
PIECE = 400  # characters of a string to heal on


def tiny(folder: Path, text: str) -> Path:
    """A Llama and a tokenizer of 512 pieces, trained for seconds: a stand-in where only the way is to be seen."""
    if (folder / "config.json").is_file():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>"], initial_alphabet=alphabet)
    )
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=512, tie_word_embeddings=True, pad_token_id=0, **sizes)
    model, tokenizer = (
        LlamaForCausalLM(config),
        PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>"),
    )
    ids = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        batch = ids[torch.randint(len(ids) - 64, (8, 1)) + torch.arange(64)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def say(stage: str, model, evaluation: Path, windows: int, seconds: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    perplexity = gk.perplexity(model, evaluation, most=windows, tokenizer=tokenizer)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    print(f"{stage:<24} perplexity {perplexity:8.3f}   {numbers:>13,} numbers   {seconds:7.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, seconds instead of an hour")
    parser.add_argument("--fraction", type=float, default=0.25, help="of the stream's width, to cut")
    parser.add_argument("--steps", type=int, help="of healing; default 100, or 8 with --quick")
    parser.add_argument("--out", type=Path, default=Path("build/slice_and_heal"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text = " ".join(topics[name] for name in sorted(topics))
    evaluation, calibration = options.out / "evaluation.txt", options.out / "calibration.txt"
    evaluation.write_text(text[:MEASURED], encoding="utf-8")
    calibration.write_text(text[MEASURED:], encoding="utf-8")
    source = (
        tiny(options.out / "model", text[MEASURED : 3 * MEASURED]) if options.quick else samples.smollm2()
    )
    windows, calibrating = (1, 4) if options.quick else (8, 64)
    steps = options.steps if options.steps is not None else 8 if options.quick else 100

    teacher = load(source)
    say("as it was", teacher, evaluation, windows, 0.0)

    begin = time.perf_counter()
    sliced = options.out / "sliced"
    if not (sliced / "config.json").is_file():
        with bar("calibrate") as progress:
            gk.slicing.slice(
                source,
                sliced,
                options.fraction,
                calibration=calibration,
                windows=calibrating,
                dtype="float32",
                calibrating=progress,
            )
    student = load(sliced)
    say(f"sliced by {options.fraction:.0%}", student, evaluation, windows, time.perf_counter() - begin)

    begin = time.perf_counter()
    learnt = text[MEASURED : MEASURED + 20 * PIECE] if options.quick else text[MEASURED:]
    pieces = [learnt[start : start + PIECE] for start in range(0, len(learnt), PIECE)]
    with bar("heal") as progress:
        report = gk.heal(
            student,
            teacher,
            pieces,
            steps=steps,
            batch_size=8,
            work_directory=options.out / "healing",
            progress=progress,
        )
    say(f"healed in {steps} steps", student, evaluation, windows, time.perf_counter() - begin)
    student.save_pretrained(options.out / "healed")
    AutoTokenizer.from_pretrained(source).save_pretrained(options.out / "healed")
    print(
        f"{report['parameters']:,} of them learnt; divergence from the model as it was, on pieces held out: "
        f"{report['divergence_before']:.3g} before, {report['divergence_after']:.3g} nats a token after"
    )


if __name__ == "__main__":
    main()
