"""Which tokens are seen: drawn inside the loss, with static shapes."""

import jax
import jax.numpy as jnp
from jaxtyping import Int

from sslx.types import Array


def kept(tokens: int, ratio: float) -> int:
    """How many of `tokens` stay visible when the share `ratio` is masked: FAIR's expression, in
    floating point, so that 100 tokens at .9 keep 9."""
    keep = int(tokens * (1 - ratio))
    if not 0 < keep < tokens:
        raise ValueError(
            f"Masking {ratio:.0%} of {tokens} patches leaves {keep} visible and "
            f"{tokens - keep} to predict, and both are needed: use a smaller patch, a larger "
            f"image or another ratio."
        )
    return keep


def shuffle(key: Array, examples: int, tokens: int) -> Int[Array, "B N"]:
    """An independent random order of the tokens for every example: the sort of uniform noise."""
    return jnp.argsort(jax.random.uniform(key, (examples, tokens)), axis=1)
