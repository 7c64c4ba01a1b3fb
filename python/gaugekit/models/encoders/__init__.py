"""Families that see the whole input: one adapter a file."""
