"""Features of a labelled set: an encoder's pooled tokens and the labels, as NumPy arrays."""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.models.encoder import Encoder, Pool
from sslx.sharding import ways
from sslx.types import Array

View = Callable[[Array, Any], Any]  # (key, batch) -> batch that the encoder reads
MOST = 100_000  # classes that a probe takes, unless there are more examples than that
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
                f"Features are not finite in {bad} of {len(self.x)} rows: the data are not, or the "
                f"run diverged; then restore an earlier checkpoint and lower the learning rate."
            )

    def __repr__(self) -> str:
        return f"Features(x={list(self.x.shape)}, label={list(self.label.shape)})"

    @property
    def classes(self) -> int:
        """The number of classes: one more than the largest label.

        Raises ValueError where examples have no label (-1), and for labels that are far more than
        examples, which are names of records and not of classes.
        """
        unlabelled = int((self.label < 0).sum())
        if unlabelled:
            raise ValueError(
                f"{unlabelled} of {len(self.label)} examples have no label (-1): probe on a source "
                f"with a label on every record (class folders, a `label` column), or with Health "
                f"alone, Probes(on=(Health(),))."
            )
        classes = int(self.label.max()) + 1
        if classes > max(len(self.label), MOST):
            raise ValueError(
                f"{len(self.label)} examples have labels up to {classes - 1}: number the classes "
                f"from 0, without gaps."
            )
        return classes


def extract(
    encoder: Encoder,
    view: View,
    batches: Iterable[dict[str, np.ndarray]],
    pool: Pool = "mean",
    sharding: NamedSharding | None = None,
    seed: int = 0,
    advanced: Callable[[], None] = lambda: None,
) -> Features:
    """Features of every valid row of finite labelled batches, one forward pass each.

    A batch is valid bool [B], the leaves that the view reads, and label int32 [B]; without labels
    they are -1. With several processes it is this process's rows, and every process receives all
    features.
    `sharding` places axis 0 of a batch. Batch i is rendered under fold_in(key(seed), i). One
    compilation per (network, view, pool, sharding) and shape, whatever the variables. `advanced` is
    called after each batch.
    """
    run = _forward(view, pool, sharding)
    pending, rows = deque(), []

    def fetch():
        x, label, valid = jax.device_get(pending.popleft())
        rows.append((x[valid], label[valid]))
        advanced()

    for i, batch in enumerate(batches):
        unlabelled = {"label": np.full(len(batch["valid"]), -1, np.int32)}
        batch = placed(unlabelled | batch, sharding)
        with jax.transfer_guard("allow"):  # of two scalars
            pending.append(run(encoder, batch, np.uint32(seed), np.int32(i)))
        if len(pending) > IN_FLIGHT:
            fetch()
    while pending:
        fetch()
    if not rows:
        raise ValueError("No batches to take features of: the labelled pipeline is empty.")
    return Features(*(np.concatenate(leaf) for leaf in zip(*rows, strict=True)))


@functools.lru_cache(maxsize=16)
def _forward(view, pool, sharding):
    """The jitted (encoder, batch, seed, i) -> (x, label, valid), replicated over the mesh."""

    def forward(encoder, batch, seed, i):
        key = jax.random.fold_in(jax.random.key(seed), i)
        x = encoder.pooled(view(key, batch), pool)
        return x, batch["label"], batch["valid"]

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
