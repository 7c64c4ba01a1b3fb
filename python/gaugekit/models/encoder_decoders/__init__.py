"""Families of an encoder and a decoder: one adapter a file."""
