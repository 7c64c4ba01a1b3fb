"""Text to run models on: real sentences, real small models, batches of tokens."""

from gaugekit.text.samples import (
    batches,
    minilm,
    random_sequences,
    read,
    sentences,
    smollm2,
    split,
    tokenize,
)

__all__ = ["batches", "minilm", "random_sequences", "read", "sentences", "smollm2", "split", "tokenize"]
