"""The evaluation that a Config holds: a backbone and two labelled sets become a few numbers."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding

from sslx.evals.features import Features, Pool, dealt, extract
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.linear import Linear
from sslx.types import Array, Buffers, Params, Tree

Pairs = Callable[[], tuple[np.ndarray, np.ndarray]]
Probe = Callable[[Features, Features, Pairs], Iterator[tuple[str, float]]]


@runtime_checkable
class Labelled(Protocol):
    """What a probe reads: every labelled example once, in batches of one shape; closable.

    And `labelled`, whether records have labels: no member here, for isinstance would read it, and
    so open the files, when a recipe is built.
    """

    def check(self) -> None: ...

    def epoch(self, batch_size: int, host: int = 0, hosts: int = 1) -> Iterator[dict]: ...


@dataclass(frozen=True)
class Probes:
    """k-NN, linear probe and health of frozen features, on labels that pretraining never read.

    Both sets are rendered by the recipe's eval view. The alignment of `Health` is that of two
    train views of the first `pairs` test examples, the same at every call.
    """

    train: Labelled
    test: Labelled
    on: tuple[Probe, ...] = (KNN(), Linear(), Health())
    pool: Pool = "mean"
    batch_size: int = 256
    pairs: int = 2048

    def check(self) -> None:
        """Raise ValueError now if a set cannot be opened or has no labels."""
        for data in (self.train, self.test):
            data.check()
            if not data.labelled:
                raise ValueError(
                    f"Probes read labels, but {data.source} has none: name a source with labels "
                    f"(class folders, a `label` column) as their train and test."
                )

    def __call__(
        self, objective: Any, params: Params, buffers: Buffers, views: Any, sharding=None
    ) -> Iterator[tuple[str, float]]:
        """(name, value) for the backbone of `objective`; `sharding` places axis 0 of a batch."""
        return self.measure(*objective.backbone(params, buffers), views, sharding)

    def measure(
        self, module: nn.Module, variables: Tree, views: Any, sharding: NamedSharding | None = None
    ) -> Iterator[tuple[str, float]]:
        """(name, value) for any encoder; `measure(Pixels(), {}, views)` is the raw-pixel floor."""
        batch_size, host, hosts = dealt(self.batch_size, sharding)

        def features(data, view, batches=None, seed=0):
            with contextlib.closing(data.epoch(batch_size, host, hosts)) as epoch:
                some = islice(epoch, batches)
                return extract(module, variables, view, some, self.pool, sharding, seed)

        @functools.cache
        def pairs():  # only if a probe asks
            batches = -(-self.pairs // batch_size)
            sides = ((Rendering(views.train, 0), 0), (Rendering(views.train, -1), 1))
            return tuple(features(self.test, view, batches, seed).x for view, seed in sides)

        train, test = features(self.train, views.eval), features(self.test, views.eval)
        pictures = getattr(module, "reads", "image") == "image"  # a text has no two renderings
        for probe in self.on:
            yield from probe(train, test, pairs if pictures else None)


@dataclass(frozen=True)
class Rendering:
    """One of the V images of a train view, as the batch of a single view."""

    view: Callable
    index: int

    def __call__(self, key: Array, batch: dict) -> dict:
        image = self.view(key, batch)["image"]  # [B, V, H, W, C], or [B, H, W, C] where V is 1
        return {"image": image if image.ndim == 4 else image[:, self.index]}
