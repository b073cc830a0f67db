"""A linear classifier on frozen features, its learning rate chosen without the test set."""

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

MOMENTUM = 0.9
CHUNK = 8192  # rows scored at once


@dataclass(frozen=True)
class LinearProbe:
    """The linear probe: softmax regression by SGD on standardized features.

    As MAE's `main_linprobe.py` (arXiv:2111.06377, A.1) the head is BatchNorm without scale, here
    the training set's exact mean and variance, and a linear layer without weight decay; momentum
    0.9, cosine to 0. All learning rates train side by side for `search_epochs` on a random
    1 - `holdout` of the training set; the most accurate on the rest (ties: the lower loss) is
    trained anew for `epochs` on all of it, and that classifier alone meets the test set. Features
    lie on each device whole, n * D * 4 bytes: 5.2 GB for ImageNet at D = 1024.
    """

    name: ClassVar[str] = "linear"
    learning_rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    epochs: int = 100
    search_epochs: int = 20
    batch_size: int = 256
    holdout: float = 0.1
    seed: int = 0

    def __call__(
        self, train: Features, test: Features, pairs=None, progress: Progress = unheard
    ) -> Iterator[tuple[str, float]]:
        rate = self.select(train, progress)
        epoch = functools.partial(progress, "linear probe")
        accuracy, _ = score(self.fit(train, (rate,), train.classes, self.epochs, epoch), test)
        yield "linear/top1", float(accuracy[0])
        yield "linear/learning_rate", rate

    def select(self, train: Features, progress: Progress = unheard) -> float:
        """The learning rate whose classifier is the most accurate on held-out training rows."""
        if len(self.learning_rates) == 1:
            return self.learning_rates[0]
        order = np.random.default_rng(self.seed).permutation(len(train.x))
        held = int(np.ceil(self.holdout * len(order)))
        if not 0 < held < len(order):
            raise ValueError(
                f"holdout={self.holdout} of {len(order)} training examples leaves nothing to "
                f"choose a learning rate by: give more examples, or one learning rate."
            )
        rest, held = (Features(train.x[i], train.label[i]) for i in (order[held:], order[:held]))
        epoch = functools.partial(progress, "linear probe: learning rates")
        heads = self.fit(rest, self.learning_rates, train.classes, self.search_epochs, epoch)
        accuracy, loss = score(heads, held)
        return self.learning_rates[np.lexsort((loss, -accuracy))[0]]

    def fit(
        self,
        train: Features,
        rates: tuple[float, ...],
        classes: int,
        epochs: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict:
        """One classifier per learning rate, side by side; the rates are split over devices."""
        mesh = local_mesh(len(rates))
        with jax.set_mesh(mesh):
            whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("rows"))
            x, y, seed = jax.device_put((train.x, train.label, np.uint32(self.seed)), whole)
            rates = jax.device_put(np.array(rates, np.float32), split)
            w = np.zeros((len(rates), x.shape[1], classes), np.float32)
            b = np.zeros((len(rates), classes), np.float32)
            carry = jax.device_put(((w, b), (w, b)), split)
            mean, scale = _standard(x)
            batch_size = min(self.batch_size, len(train.x))
            for e in range(epochs):
                at = jax.device_put(np.int32(e), whole)
                carry = _epoch(carry, x, y, rates, mean, scale, seed, at, epochs, batch_size)
                progress(e + 1, epochs)
            w, b = jax.device_get(carry[0])
        return {"w": w, "b": b, "mean": np.asarray(mean), "scale": np.asarray(scale)}


@jax.jit
def _standard(x):
    """Mean and inverse standard deviation of each feature of x [n, D]."""
    return x.mean(0), jax.lax.rsqrt(x.var(0) + 1e-6)


@functools.partial(jax.jit, static_argnums=(8, 9), donate_argnums=0)
def _epoch(carry, x, y, rates, mean, scale, seed, e, epochs, batch_size):
    """Heads (w [R, D, C], b [R, C]) and their momenta after an epoch of SGD on cross-entropy."""
    n, classes = len(x), carry[0][1].shape[1]
    steps = n // batch_size

    def train(carry, x, y, rates, mean, scale, seed, e):
        def step(carry, at):
            (w, b), (w_m, b_m) = carry
            t, rows = at
            x_t = (x[rows] - mean) * scale  # [B, D]
            g = jax.nn.softmax(_logits(w, b, x_t)) - jax.nn.one_hot(y[rows], classes)  # [R, B, C]
            g = g / batch_size
            w_m = MOMENTUM * w_m + jnp.einsum("bd,rbc->rdc", x_t, g, precision="highest")
            b_m = MOMENTUM * b_m + g.sum(1)
            rate = rates * (1 + jnp.cos(jnp.pi * t / (epochs * steps))) / 2  # [R]
            w, b = w - rate[:, None, None] * w_m, b - rate[:, None] * b_m
            return ((w, b), (w_m, b_m)), None

        rows = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), e), n)
        rows = rows[: steps * batch_size].reshape(steps, batch_size)
        return jax.lax.scan(step, carry, (e * steps + jnp.arange(steps), rows))[0]

    split, whole = P("rows"), P()
    specs = (split, whole, whole, split, *[whole] * 4)
    train = jax.shard_map(train, in_specs=specs, out_specs=split, check_vma=False)
    return train(carry, x, y, rates, mean, scale, seed, e)


def _logits(w, b, x):
    return jnp.einsum("bd,rdc->rbc", x, w, precision="highest") + b[:, None]


def score(heads: dict, test: Features) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and mean cross-entropy [R] of each head; a class no head knows counts as wrong."""
    with jax.set_mesh(local_mesh(1)):
        heads = jax.device_put(heads)
        parts = [
            _score(heads, *jax.device_put((test.x[i : i + CHUNK], test.label[i : i + CHUNK])))
            for i in range(0, len(test.x), CHUNK)
        ]
    return tuple(np.sum(jax.device_get(parts), 0) / len(test.x))


@jax.jit
def _score(heads, x, y):
    x = (x - heads["mean"]) * heads["scale"]
    logp = jax.nn.log_softmax(_logits(heads["w"], heads["b"], x))  # [R, B, C]
    nll = -jnp.take_along_axis(logp, y[None, :, None], -1, mode="clip")[..., 0]
    return (logp.argmax(-1) == y).sum(1).astype(jnp.float32), nll.sum(1)
