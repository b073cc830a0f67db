"""Health of embeddings: measures of collapse that are cheap enough for every step.

A run collapses when `embedding_std` and `feature_std` fall towards 0 while `positive_similarity`
and `negative_similarity` both rise towards 1. `participation_ratio` falls to a few dimensions
when the collapse is one of dimensions.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sslx.ops.losses import unit
from sslx.types import Array, Metrics


def embedding_metrics(h: Float[Array, "B V D"], z: Float[Array, "B V P"]) -> Metrics:
    """Scalars of features h and embeddings z, over all views of the batch.

    feature_std, embedding_std   1 on an isotropic sphere, 0 when all vectors are one
    participation_ratio          of z: how many dimensions its covariance fills, at most P
    positive_similarity          mean cosine of two views of one example
    negative_similarity          mean cosine of views of two examples
    """
    h, z = jax.lax.stop_gradient((h, z))
    positive, negative = similarities(z)
    return {
        "feature_std": feature_std(h.reshape(-1, h.shape[-1])),
        "embedding_std": feature_std(z.reshape(-1, z.shape[-1])),
        "participation_ratio": participation_ratio(z.reshape(-1, z.shape[-1])),
        "positive_similarity": positive,
        "negative_similarity": negative,
    }


def feature_std(x: Float[Array, "B D"]) -> Float[Array, ""]:
    """sqrt(D) times the mean over dimensions of the std of x / |x| (arXiv:2011.10566, section 4).

    The same number as the evaluation's `health/feature_std`.
    """
    return unit(x).std(0).mean() * x.shape[-1] ** 0.5


def participation_ratio(x: Float[Array, "B D"]) -> Float[Array, ""]:
    """tr(C)^2 / tr(C^2) of the covariance C of x / |x|: its number of equal eigenvalues.

    The exponential of the spectrum's Renyi entropy of order two, where RankMe's (of singular
    values, not centered) is of order one: it needs one product and no eigenvalues, which are far
    too slow for every step. RankMe itself is the evaluation's. 0 when all vectors are one.
    """
    x = unit(x)
    x = x - x.mean(0)
    c = jnp.matmul(x.T, x, precision="highest") / len(x)  # [D, D]: sums over devices stay small
    total = jnp.trace(c)
    return total**2 / jnp.maximum(jnp.sum(c * c), 1e-30)


def similarities(z: Float[Array, "B V P"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cosine over pairs of views of one example, and over pairs of two examples' views.

    From sums of vectors, never the matrix of all pairs.
    """
    z = unit(z)
    examples, views, _ = z.shape
    own = jnp.square(z.sum(1)).sum(-1)  # [B]: all pairs of an example's views, themselves too
    alone = jnp.square(z).sum((1, 2))
    positive = (own - alone).mean() / max(views * (views - 1), 1)
    others = jnp.square(z.sum((0, 1))).sum() - own.sum()
    return positive, others / max(views**2 * examples * (examples - 1), 1)
