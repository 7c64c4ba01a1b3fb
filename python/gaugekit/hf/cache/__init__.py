"""Decoding from one cached tensor in transformers' models: layers of its caches, and the attention that fills them."""
