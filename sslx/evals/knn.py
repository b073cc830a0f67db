"""Weighted nearest neighbors of frozen features, exact."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.config import Progress, unheard
from sslx.evals.features import Features, local_mesh

QUERIES, BANK = 1024, 8192  # rows of one block of similarities


@dataclass(frozen=True)
class KNN:
    """k-NN classification as of InstDisc (arXiv:1805.01978, section 3.4) and DINO.

    Each of the k most cosine-similar training features votes for its class with weight
    exp(similarity / temperature). The bank lies on each device whole: n * D * 4 bytes.
    """

    name: ClassVar[str] = "knn"
    k: int = 20
    temperature: float = 0.07

    def __call__(
        self, train: Features, test: Features, pairs=None, progress: Progress = unheard
    ) -> Iterator[tuple[str, float]]:
        predicted = self.predict(train, test.x, progress=progress)
        yield "knn/top1", float((predicted == test.label).mean())

    def predict(
        self,
        train: Features,
        x: np.ndarray,
        mesh: Mesh | None = None,
        progress: Progress = unheard,
    ) -> np.ndarray:
        """The predicted labels int32 [n] of features x [n, D]; on `mesh`, or local devices."""
        if self.k > len(train.x):
            raise ValueError(
                f"{self} needs {self.k} neighbors but the training set has {len(train.x)} "
                f"examples: use KNN(k={len(train.x)}) or less, on the command line "
                f"evals.probes.on.0.k={len(train.x)} (`sslx show` prints the path)."
            )
        chunk = min(QUERIES, len(x))
        mesh = mesh or local_mesh(chunk)
        starts = [min(i, len(x) - chunk) for i in range(0, len(x), chunk)]  # the last overlaps
        with jax.set_mesh(mesh):
            bank, label = jax.device_put((train.x, train.label), NamedSharding(mesh, P()))
            split = NamedSharding(mesh, P("rows"))
            votes = [
                _vote(
                    jax.device_put(x[i : i + chunk], split),
                    bank,
                    label,
                    self.k,
                    self.temperature,
                    train.classes,
                )
                for i in starts
            ]
        out = np.empty(len(x), np.int32)
        for done, (i, vote) in enumerate(zip(starts, votes, strict=True), 1):
            out[i : i + chunk] = jax.device_get(vote)
            progress("k-NN", done, len(starts))
        return out


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _vote(query, bank, label, k, temperature, classes):
    """The predicted labels [Q] of queries [Q, D], sharded over devices by rows."""

    def vote(query, bank, label):
        s, y = nearest(query, bank, label, k)  # [Q, k]
        weight = jnp.exp((s - s[:, :1]) / temperature)  # relative to the nearest: no overflow
        row = jnp.arange(len(query))[:, None]
        return jnp.zeros((len(query), classes)).at[row, y].add(weight).argmax(-1)

    specs = (P("rows"), P(), P())
    vote = jax.shard_map(vote, in_specs=specs, out_specs=P("rows"), check_vma=False)
    return vote(query, bank, label)


def nearest(query, bank, label, k):
    """Cosines, descending, and labels [Q, k] of each query's k nearest in the bank [n, D].

    A running top-k over blocks of the bank: the similarity matrix [Q, n] never exists.
    """
    n = len(bank)
    chunk = min(max(BANK, k), n)
    query = _unit(query)

    def block(best, i):
        start = jnp.minimum(i * chunk, n - chunk)  # the last block overlaps the one before
        rows = _unit(jax.lax.dynamic_slice_in_dim(bank, start, chunk))
        s = jnp.matmul(query, rows.T, precision="highest")  # [Q, chunk]
        s = jnp.where(start + jnp.arange(chunk) < i * chunk, -jnp.inf, s)  # seen already
        s, at = jax.lax.top_k(s, k)
        s, y = jnp.concatenate([best[0], s], 1), jnp.concatenate([best[1], label[start + at]], 1)
        s, at = jax.lax.top_k(s, k)
        return (s, jnp.take_along_axis(y, at, 1)), None

    best = jnp.full((len(query), k), -jnp.inf), jnp.zeros((len(query), k), label.dtype)
    return jax.lax.scan(block, best, jnp.arange(-(-n // chunk)))[0]


def _unit(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
