"""Small models with random weights and tokenizers of single letters, saved the way users have models on disk."""

import string
from pathlib import Path

import torch
from transformers import BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from tiny import add_tokenizer, bert

LAYERS, HEADS, WIDTH = 2, 4, 32  # of tiny.bert
SQUARE = LAYERS * WIDTH * (WIDTH // HEADS)  # one d × d block a head and layer: L H d²
BIAS = LAYERS * WIDTH


def write(folder: Path) -> Path:
    """Saves a BERT and its tokenizer into ``folder`` and returns it."""
    letters = [*string.ascii_lowercase, *string.digits, *".,()'\"`-_:;!?/*"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    torch.manual_seed(0)
    model = bert(vocab_size=len(words), max_position_embeddings=64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # fresh biases are zero and would hide a lost one
    model.save_pretrained(folder)
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return folder


def write_speaker(folder: Path) -> Path:
    """Saves a Llama of bfloat16 and its tokenizer into ``folder`` and returns it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=192, max_position_embeddings=96,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    add_tokenizer(folder)
    return folder
