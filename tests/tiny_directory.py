"""A small BERT with random weights and a tokenizer of single letters, saved the way users have models on disk."""

import string
from pathlib import Path

import torch
from transformers import BertTokenizerFast

from tiny import bert

LAYERS, HEADS, WIDTH = 2, 4, 32  # of tiny.bert
SQUARE = LAYERS * WIDTH * (WIDTH // HEADS)  # one d × d block a head and layer: L H d²
BIAS = LAYERS * WIDTH


def write(folder: Path) -> Path:
    """Saves the model and its tokenizer into ``folder`` and returns it."""
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
