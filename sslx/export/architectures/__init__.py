"""Architectures: config.json in both directions, and one table of names, a file each."""
