"""Trains a small OPT on Python's documentation: a model with LayerNorms and biases to slice, none being installable.

    python bench/train_opt.py OUT                # some 8 minutes on two cores: D 512, 6 layers, 8 heads
    python bench/train_opt.py OUT --steps 1000

``pydoc_data.topics`` joined by blanks: the first 60,000 characters are left for measuring (bench/slicing.py measures
there), the rest is learnt from, in batches of 8 × 128 tokens of a byte-level BPE that is trained on it too. OUT becomes
a Hugging Face directory, float32, with its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from documentation import learnt_and_measured

VOCABULARY, PAD, END = 2048, "<pad>", "</s>"
ROWS, LENGTH = 8, 128
WARM_UP = 20  # steps


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``text``; any text can be written in it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END)


def fresh(width: int, layers: int, heads: int, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """An OPT as Zhang et al. (2022) build theirs: ReLU, learned positions, tied embeddings, nothing dropped."""
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        max_position_embeddings=LENGTH,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return OPTForCausalLM(config)


def train(model: OPTForCausalLM, ids: torch.Tensor, steps: int, learning_rate: float) -> float:
    """Trains in place; the mean loss of the last tenth of the steps, in nats a token."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    generator, losses, begin = torch.Generator().manual_seed(0), [], time.perf_counter()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = learning_rate * min((step + 1) / WARM_UP, cosine)
        starts = torch.randint(len(ids) - LENGTH + 1, (ROWS, 1), generator=generator)
        batch = ids[starts + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 20 == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step + 1} of {steps}: loss {losses[-1]:.3f}, {seconds:.0f} s", flush=True)
    return sum(losses[-max(steps // 10, 1) :]) / max(steps // 10, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"out: expected a new or empty directory, got {options.out}, which holds files")
    text, _ = learnt_and_measured()
    tokenizer = tokenizer_of(text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    model = fresh(options.width, options.layers, options.heads, tokenizer)
    begin = time.perf_counter()
    loss = train(model, ids, options.steps, options.learning_rate)
    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(
        json.dumps(
            {
                "parameters": model.num_parameters(),
                "tokens": len(ids),
                "steps": options.steps,
                "loss": loss,
                "seconds": time.perf_counter() - begin,
            }
        )
    )


if __name__ == "__main__":
    main()
