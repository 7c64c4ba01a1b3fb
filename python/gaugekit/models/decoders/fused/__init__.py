"""Decoders in which one module computes queries, keys and values: one adapter a file."""
