"""Trained weights out to other libraries and in from them, without torch and without them."""
