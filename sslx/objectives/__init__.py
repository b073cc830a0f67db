"""Pretraining methods: one paper, one file."""
