"""Encoders, heads and decoders: Linen modules that name the axes of their params."""
