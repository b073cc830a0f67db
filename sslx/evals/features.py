"""A frozen backbone over a labelled set: examples in, one float32 vector and one label each out."""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.models.heads import Pool, pooled
from sslx.sharding import ways
from sslx.types import Array, Tree

View = Callable[[Array, Any], Any]  # (key, batch) -> batch that the encoder reads
# The leaves of a batch that an encoder gets, in order, by what it `reads`.
LEAVES = {"image": ("image",), "tokens": ("tokens", "segments")}
COLUMNS = 8192  # of word counts
IN_FLIGHT = 4  # batches dispatched before the oldest one's features are fetched


@dataclass(frozen=True, eq=False)
class Features:
    """Pooled features x float32 [n, D] and their labels int32 [n], on the host of every process.

    Raises ValueError where x is not finite, so that no number below is measured on NaN.
    """

    x: np.ndarray
    label: np.ndarray

    def __post_init__(self):
        if self.x.ndim != 2 or self.label.shape != self.x.shape[:1] or not len(self.x):
            raise ValueError(
                f"Features are x [n, D] and label [n], n > 0, "
                f"but got {list(self.x.shape)} and {list(self.label.shape)}."
            )
        bad = len(self.x) - int(np.isfinite(self.x).all(1).sum())
        if bad:
            raise ValueError(
                f"Features are not finite in {bad} of {len(self.x)} rows: the run diverged; "
                f"restore an earlier checkpoint and lower the learning rate."
            )

    @property
    def classes(self) -> int:
        """One more than the largest label; a class without examples is merely never seen.

        Raises ValueError where examples have no label (-1).
        """
        unlabelled = int((self.label < 0).sum())
        if unlabelled:
            raise ValueError(
                f"{unlabelled} of {len(self.label)} examples have no label (-1): probe on a source "
                f"with a label on every record, or with Health alone, Probes(on=(Health(),))."
            )
        return int(self.label.max()) + 1


class Pixels(nn.Module):
    """The encoder that does nothing: one token, the view's pixels. Its probes are the floor."""

    prefix: ClassVar[int] = 0
    reads: ClassVar[str] = "image"

    def __call__(self, x: Array, train: bool = False) -> Array:
        return x.reshape(len(x), 1, -1)  # [B, 1, H * W * C]


class Counts(nn.Module):
    """The floor of text: one token, how often each id below `size` occurs in a window.

    Beyond COLUMNS ids share columns (the hashing trick, arXiv:0902.2206): 32 KiB a text at most.
    """

    size: int
    prefix: ClassVar[int] = 0
    reads: ClassVar[str] = "tokens"

    def __call__(self, tokens: Array, segments: Array, train: bool = False) -> Array:
        real, columns = segments > 0, min(self.size, COLUMNS)
        row = jnp.arange(len(tokens))[:, None]
        counts = jnp.zeros((len(tokens), columns)).at[row, tokens % columns].add(real)
        return (counts / jnp.maximum(real.sum(1, keepdims=True), 1))[:, None]  # [B, 1, columns]


def extract(
    module: nn.Module,
    variables: Tree,
    view: View,
    batches: Iterable[dict[str, np.ndarray]],
    pool: Pool = "mean",
    sharding: NamedSharding | None = None,
    seed: int = 0,
) -> Features:
    """Features of every valid row of finite labelled batches, one forward pass each.

    A batch is label int32 [B], valid bool [B] and what the view reads: image uint8 [B, H, W, C]
    and maybe more, or tokens and segments int32 [B, L]. It is this process's rows where there are
    several, and then all receive all features.
    `sharding` places axis 0 of a batch. Batch i is rendered under fold_in(key(seed), i). One
    compilation per (module, view, pool, sharding) and shape, whatever the variables.
    """
    run = _forward(module, view, pool, sharding)
    pending, rows = deque(), []

    def fetch():
        x, label, valid = jax.device_get(pending.popleft())
        rows.append((x[valid], label[valid]))

    for i, batch in enumerate(batches):
        if "label" not in batch:
            raise ValueError(
                f"Probes read label [B] but this batch has only {', '.join(batch)}: name a source "
                f"with labels (class folders, a `label` column) as their train and test."
            )
        batch = placed(batch, sharding)
        with jax.transfer_guard("allow"):  # of two scalars
            pending.append(run(variables, batch, np.uint32(seed), np.int32(i)))
        if len(pending) > IN_FLIGHT:
            fetch()
    while pending:
        fetch()
    if not rows:
        raise ValueError("No batches to take features of: the labelled pipeline is empty.")
    return Features(*(np.concatenate(leaf) for leaf in zip(*rows, strict=True)))


@functools.lru_cache(maxsize=16)
def _forward(module, view, pool, sharding):
    """The jitted (variables, batch, seed, i) -> (x, label, valid), replicated over the mesh."""

    def forward(variables, batch, seed, i):
        key = jax.random.fold_in(jax.random.key(seed), i)
        seen = view(key, batch)
        leaves = LEAVES[getattr(module, "reads", "image")]  # an encoder of images may not say it
        tokens = module.apply(variables, *(seen[leaf] for leaf in leaves), train=False)  # [B, N, D]
        real = seen["segments"] > 0 if "segments" in leaves else None
        return pooled(tokens, module.prefix, pool, real), batch["label"], batch["valid"]

    # Replicated outputs: each process then reads all rows from its own devices.
    return jax.jit(forward, out_shardings=sharding and NamedSharding(sharding.mesh, P()))


def dealt(batch_size: int, sharding: NamedSharding | None) -> tuple[int, int, int]:
    """(examples of a batch, rounded up to what the mesh divides; this process; processes)."""
    if sharding is None:
        return batch_size, 0, 1
    parts = ways(sharding.mesh)
    return -(-batch_size // parts) * parts, jax.process_index(), jax.process_count()


def placed(batch: dict[str, np.ndarray], sharding: NamedSharding | None) -> dict[str, Array]:
    """A process's share of a batch, on the devices."""
    if sharding is None:
        return jax.device_put(batch)
    place = functools.partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(place, dict(batch))


def local_mesh(n: int) -> Mesh:
    """One axis, `rows`, over as many of this process's devices as divide n.

    Every process holds all features, so each measures them on its own devices, without
    collectives; enter it with `jax.set_mesh`, which the training mesh then does not disturb.
    """
    devices = jax.local_devices()
    ways = math.gcd(n, len(devices))
    return Mesh(np.array(devices[:ways]), ("rows",), axis_types=(AxisType.Auto,))
