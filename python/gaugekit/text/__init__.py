"""Text to run models on: real sentences, real small models, batches of tokens."""

from gaugekit.text.batches import batches, tokenize
from gaugekit.text.samples import minilm, random_sequences, smollm2
from gaugekit.text.sentences import read, sentences, split

__all__ = ["batches", "minilm", "random_sequences", "read", "sentences", "smollm2", "split", "tokenize"]
