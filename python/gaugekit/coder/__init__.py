"""Coded blobs (docs/format.md) made and read on NumPy arrays, without torch: in C++ where it was built, or in NumPy."""
