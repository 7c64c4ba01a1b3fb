"""One tensor to bytes and back: a blob, the fixed-length layout, pieces of a blob, a GPU's decoder."""
