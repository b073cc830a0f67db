"""Features of a labelled set: an encoder's pooled tokens and the labels, as NumPy arrays."""

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.models.encoder import Encoder, Pool
from sslx.sharding import placed, rows_here, ways
from sslx.types import Array

View = Callable[[Array, Any], Any]  # (key, batch) -> batch that the encoder reads
MOST = 100_000  # classes that a probe takes, unless there are more examples than that
IN_FLIGHT = 4  # batches dispatched before the oldest one's features are fetched


@runtime_checkable
class Labelled(Protocol):
    """A set to evaluate on, a Pipeline: every example once, in batches of one shape.

    And `unlabelled`, why records have no labels, empty if they have, and `classes`, their names:
    no members here, for isinstance would read them, and so open the files, when a recipe is built.
    """

    def check(self) -> None: ...

    def __len__(self) -> int: ...

    def epoch(self, batch_size: int, rows: Sequence[int] | None = None) -> Iterator[dict]: ...

    def check_dropped(self, counts: np.ndarray, examples: int) -> None: ...


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
    data: Labelled,
    batch_size: int,
    pool: Pool = "mean",
    sharding: NamedSharding | None = None,
    seed: int = 0,
    most: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Features of every example of a set, or of the first `most` batches of it, one forward pass
    each; labels are -1 where there are none.

    With several processes every one receives all features. `sharding` places axis 0 of a batch.
    Batch i is rendered under fold_in(key(seed), i). One compilation per (network, view, pool,
    sharding) and shape, whatever the variables. `progress` is called with the number of batches
    that are done and of all.
    """
    run = _forward(view, pool, sharding)
    pending, rows = deque(), []

    def fetch():
        features, total = pending.popleft()
        x, label, valid = jax.device_get(features)
        rows.append((x[valid], label[valid]))
        progress(len(rows), total)

    with contextlib.closing(batches(data, batch_size, sharding, most)) as stream:
        for i, (batch, total) in enumerate(stream):
            with jax.transfer_guard("allow"):  # of two scalars
                pending.append((run(encoder, batch, np.uint32(seed), np.int32(i)), total))
            if len(pending) > IN_FLIGHT:
                fetch()
    while pending:
        fetch()
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


def batches(
    data: Labelled, batch_size: int, sharding: NamedSharding | None, most: int | None = None
) -> Iterator[tuple[dict[str, Array], int]]:
    """(batch, number of batches) of a set, one after another on the devices; at most `most`.

    A batch holds valid bool [B], label int32 [B] and the set's arrays. With a sharding its size is
    rounded up to what the mesh divides, and each process reads the rows of its devices. Raises
    DataError, in every process, where too many records are corrupt.
    """
    parts = ways(sharding.mesh) if sharding else 1
    batch_size = -(-batch_size // parts) * parts
    if sharding:
        rows = rows_here(batch_size, sharding)
        put = functools.partial(placed, rows=rows, batch_size=batch_size, sharding=sharding)
    else:
        rows, put = range(batch_size), jax.device_put
    total = -(-len(data) // batch_size)
    total, counts = min(total, most or total), None
    with contextlib.closing(data.epoch(batch_size, rows)) as epoch:
        for batch in islice(epoch, most):
            batch = put({"label": np.full(len(rows), -1, np.int32), **batch})
            counts = _added(counts, batch.pop("dropped"), sharding)
            yield batch, total
    if counts is not None:
        data.check_dropped(np.asarray(counts), total * batch_size)


@functools.partial(jax.jit, static_argnums=2)
def _added(counts, dropped, sharding):
    """The counts [S] with those of one more batch [B, S], on every device."""
    counts = dropped.sum(0) if counts is None else counts + dropped.sum(0)
    if sharding is None:
        return counts
    return jax.lax.with_sharding_constraint(counts, NamedSharding(sharding.mesh, P()))


def local_mesh(n: int) -> Mesh:
    """One axis, `rows`, over as many of this process's devices as divide n.

    Every process holds all features, so each measures them on its own devices, without
    collectives; enter it with `jax.set_mesh`, which the training mesh then does not disturb.
    """
    devices = jax.local_devices()
    ways = math.gcd(n, len(devices))
    return Mesh(np.array(devices[:ways]), ("rows",), axis_types=(AxisType.Auto,))
