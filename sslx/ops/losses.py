"""Losses of embeddings and of logits, in float32 whatever the network computed in.

Similarities are matrix products at precision "highest". By default a TPU multiplies float32 in
bfloat16 and a GPU in TF32, with an error near 1e-3 that a temperature of 0.1 makes 1e-2 of a logit;
beside the encoder the exact product costs nothing.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from sslx.ops.chunks import in_chunks
from sslx.types import Array


def unit(x: Float[Array, "*B P"]) -> Float[Array, "*B P"]:
    """Vectors of length one along the last axis, in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def nt_xent(z: Float[Array, "B 2 P"], temperature: float, chunks: int = 1) -> Float[Array, "B 2"]:
    """Cross-entropy of every anchor's positive among the other 2 B - 1 (arXiv:2002.05709, eq. 1).

    An anchor is one view of an example, its positive the other view; cosine similarity over
    `temperature`. With `chunks` the [2 B, 2 B] similarities are never whole: 1 / chunks of their
    rows are in memory at a time, forward and backward, and the result is the same.
    """
    flat = unit(z).reshape(-1, z.shape[-1])  # [2 B, P]: the positive of row i is row i ^ 1
    column = jnp.arange(len(flat))

    def rows(part):
        anchor, row = part  # [R, P], [R]
        similarity = jnp.matmul(anchor, flat.T, precision="highest")  # [R, 2 B]
        itself = row[:, None] == column
        logits = jnp.where(itself, -jnp.inf, similarity / temperature)
        return optax.softmax_cross_entropy_with_integer_labels(logits, row ^ 1), ()

    loss, _ = in_chunks(rows, (flat, column), chunks)
    return loss.reshape(z.shape[:2])


def regression(q: Float[Array, "B P"], z: Float[Array, "B P"]) -> Float[Array, "B"]:
    """|q / |q| - z / |z||^2 of every pair, 2 - 2 cos: 0 to 4 (arXiv:2006.07733, eq. 2)."""
    return jnp.square(unit(q) - unit(z)).sum(-1)


def masked_cross_entropy(
    logits: Float[Array, "B M V"],
    target: Int[Array, "B M"],
    weight: Float[Array, "B M"],
    epsilon: float = 0.0,
) -> Float[Array, ""]:
    """The mean of -log softmax over what has weight, of the whole batch; 0 where nothing has.

    BERT divides by the sum of weights plus `epsilon` 1e-5, RoBERTa and transformers by the sum.
    """
    each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target)
    total = weight.sum()
    return (weight * each).sum() / jnp.where(total + epsilon > 0, total + epsilon, 1.0)
