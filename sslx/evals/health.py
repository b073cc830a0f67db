"""Health of a representation: measures of collapse that need no classifier."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.config import Progress, unheard
from sslx.evals.features import Features, local_mesh

CHUNK = 512  # rows of one block of distances


@dataclass(frozen=True)
class Health:
    """Spread, rank, alignment and uniformity of the test features; labels are not read.

    RankMe and uniformity look at `rows` random examples. Alignment is measured where `pairs` is
    given: a function of nothing that returns features [n, D] of two renderings of n images.
    """

    name: ClassVar[str] = "health"
    rows: int = 8192
    seed: int = 0

    def __call__(
        self,
        train: Features,
        test: Features,
        pairs: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
        progress: Progress = unheard,
    ) -> Iterator[tuple[str, float]]:
        order = np.random.default_rng(self.seed).permutation(len(test.x))
        some = test.x[order[: self.rows]]
        yield "health/feature_std", feature_std(test.x)
        yield "health/rankme", rankme(some)
        if len(some) > 1:
            yield "health/uniformity", uniformity(some)
        if pairs is not None:
            yield "health/alignment", alignment(*pairs())


def feature_std(x: np.ndarray) -> float:
    """sqrt(D) times the mean over dimensions of the std of x [n, D] / |x| (arXiv:2011.10566).

    1 on an isotropic sphere, 0 when all features are one.
    """
    return float(unit(x).std(0, dtype=np.float64).mean() * np.sqrt(x.shape[1]))


def rankme(x: np.ndarray) -> float:
    """exp of the entropy of the normalized singular values of x [n, D] (arXiv:2210.02885, eq. 1).

    p = s / |s|_1 + 1e-7, features as they are, not centered. From the smaller Gram matrix in
    float64: singular values below about 1e-8 of the largest are noise, an order under the 1e-7.
    """
    x = x.astype(np.float64)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    s = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    p = s / max(s.sum(), 1e-300) + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def uniformity(x: np.ndarray, t: float = 2.0) -> float:
    """log mean exp(-t |x_i - x_j|^2) over pairs i != j of unit features (arXiv:2005.10242).

    0 when all features are one; about -2 t on a high-dimensional sphere.
    """
    n, chunk = len(x), min(CHUNK, len(x))
    mesh = local_mesh(1)
    with jax.set_mesh(mesh):
        starts = list(np.arange(0, n, chunk, np.int32))
        z, starts = jax.device_put((unit(x), starts), NamedSharding(mesh, P()))
        parts = [_kernel(z, i, t, chunk) for i in starts]
    total = np.concatenate(jax.device_get(parts)).sum(dtype=np.float64)
    return float(np.log(total / (n * (n - 1))))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _kernel(z, i, t, chunk):
    """Rows i, ... i + chunk of the kernel matrix of z [n, D], summed without the diagonal."""
    n = len(z)
    start = jnp.minimum(i, n - chunk)  # the last block overlaps; its repeated rows count 0
    row = start + jnp.arange(chunk)[:, None]
    rows = jax.lax.dynamic_slice_in_dim(z, start, chunk)
    norm = jnp.sum(z * z, -1)
    square = norm[row] + norm - 2 * jnp.matmul(rows, z.T, precision="highest")
    kept = (row >= i) & (row != jnp.arange(n))
    return jnp.where(kept, jnp.exp(-t * jnp.maximum(square, 0)), 0).sum(-1)


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared distance of unit features x, y [n, D] of positive pairs (arXiv:2005.10242)."""
    return float(np.square(unit(x) - unit(y)).sum(-1).mean(dtype=np.float64))


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one; a zero row stays zero, so that dead features count as collapsed."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
