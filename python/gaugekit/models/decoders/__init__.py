"""Families that see only what came before: one adapter a file."""
