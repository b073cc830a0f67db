"""Probes: what the frozen features of a labelled set are worth, as a few numbers."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sslx.config import Eval, Numbers, Progress, Trained
from sslx.evals.classes import numbering, renumbered
from sslx.evals.features import Features, Labelled, extract
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.linear import LinearProbe
from sslx.models.encoder import Encoder, Pool, chosen
from sslx.types import Array
from sslx.views import Views

log = logging.getLogger("sslx")
Pairs = Callable[[], tuple[np.ndarray, np.ndarray]]
# A value with a `name`, or a function.
Probe = Callable[[Features, Features, Pairs | None, Progress], Iterator[tuple[str, float]]]


@dataclass(frozen=True)
class Probes(Eval):
    """k-NN, linear probe and health of frozen features, on labels that pretraining never read.

    Both sets are rendered by the recipe's eval view. The alignment of `Health` is that of two
    train views of the first `pairs` test examples, the same at every call. `encoder` names the
    objective's encoder to probe; by default it is the first.
    """

    train: Labelled
    test: Labelled
    on: tuple[Probe, ...] = (KNN(), LinearProbe(), Health())
    pool: Pool = "mean"
    batch_size: int = 256
    pairs: int = 2048
    encoder: str | None = None

    def check(self) -> None:
        """Raise ValueError now if a set cannot be opened or has no labels."""
        for data in (self.train, self.test):
            data.check()
            if data.unlabelled:
                raise ValueError(
                    f"Probes read labels, but {data.source} has none, for {data.unlabelled}: "
                    f"name sources with labels (class folders, a `label` column), or evals={{}}."
                )
        numbers = numbering(self.train.classes, self.test.classes)
        if not numbers and (self.train.classes or self.test.classes):
            named, other = (self.train, self.test)[:: 1 if self.train.classes else -1]
            log.warning(
                "%s names its classes and %s only numbers them: labels are compared by number",
                named.source,
                other.source,
            )

    def __call__(self, trained: Trained) -> Iterator[tuple[str, float]]:
        return self.measure(self.encoder_of(trained), trained)

    def floors(self, trained: Trained) -> Numbers:
        """The same numbers of the raw input, which needs no encoder, under the floor's name."""
        floor = self.encoder_of(trained).floor
        if floor is None:
            return {}
        return {floor.network.name: dict(self.measure(floor, trained))}

    def parts(self) -> tuple[str, ...]:
        return tuple(getattr(probe, "name", None) or probe.__name__ for probe in self.on)

    def only(self, names: Collection[str]) -> "Probes":
        kept = zip(self.parts(), self.on, strict=True)
        return dataclasses.replace(self, on=tuple(probe for name, probe in kept if name in names))

    def encoder_of(self, trained: Trained) -> Encoder:
        return chosen(trained.objective.encoders(trained.params, trained.buffers), self.encoder)

    def measure(self, encoder: Encoder, trained: Trained) -> Iterator[tuple[str, float]]:
        """(name, value) for any encoder, such as `encoder.floor`."""
        views, sharding, progress = trained.views, trained.sharding, trained.progress

        def features(task, data, view, most=None, seed=0):
            return extract(
                encoder,
                view,
                data,
                self.batch_size,
                self.pool,
                sharding,
                seed,
                most,
                functools.partial(progress, task),
            )

        @functools.cache
        def pairs():  # only if a probe asks
            most = -(-self.pairs // self.batch_size)
            sides = ((Rendering(views, 0), 0), (Rendering(views, -1), 1))
            return tuple(features("pairs", self.test, view, most, seed).x for view, seed in sides)

        train = features("features of train", self.train, views.eval)
        test = features("features of test", self.test, views.eval)
        test = renumbered(test, numbering(self.train.classes, self.test.classes))
        augmented = views.train != views.eval  # else an example has no two renderings
        for probe in self.on:
            yield from probe(train, test, pairs if augmented else None, progress)


@dataclass(frozen=True)
class Rendering:
    """One of the renderings of the train view, as a batch that looks like the eval view's."""

    views: Views
    index: int

    def __call__(self, key: Array, batch: dict[str, Any]) -> dict[str, Array]:
        seen = self.views.train(key, batch)
        single = jax.eval_shape(self.views.eval, key, batch)
        return {
            name: x[:, self.index] if name in single and x.ndim > single[name].ndim else x
            for name, x in seen.items()
        }
