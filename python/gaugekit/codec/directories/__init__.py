"""Directories of .safetensors files: the job that packs or restores one, and its index files."""
