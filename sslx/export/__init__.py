"""Checkpoints for other libraries and from them, written and read without these libraries."""
