"""The law: which record stands at which row of which step, from (seed, step, row) alone.

It knows nothing of hosts, workers, devices and restarts: whoever holds a row asks for it. Only
numbers of records are shuffled and mixed here; reading them is the pipeline's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sslx.data.source import DataError


@dataclass(frozen=True)
class Shuffled:
    """The order of training: every source permuted anew in each epoch, several mixed by weight.

    ends     where each source's records end, all sources counted through
    weights  of the sources
    """

    ends: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    batch_size: int  # global

    @cached_property
    def numbers(self) -> Any:
        import grain

        sources = [
            grain.MapDataset.range(begin, end).shuffle(seed=seed_of(self.seed, k)).repeat()
            for k, (begin, end) in enumerate(zip((0, *self.ends), self.ends, strict=False))
        ]
        return sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, self.weights)

    def __call__(self, step: int, rows: Sequence[int]) -> np.ndarray:
        """Numbers of the records at some rows of a step's batch, int [rows]."""
        return np.array([self.numbers[place(step, row, self.batch_size)] for row in rows])


@dataclass(frozen=True)
class Once:
    """The order of an evaluation: every record once, as they lie; numbers beyond them are pads."""

    seed: int
    batch_size: int  # global

    def __call__(self, step: int, rows: Sequence[int]) -> np.ndarray:
        """Numbers of the records at some rows of a step's batch, int [rows]."""
        return np.array([place(step, row, self.batch_size) for row in rows])


def checked(rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    """Rows of a global batch, all by default; raises DataError for what are none."""
    if batch_size < 1:
        raise DataError(f"a global batch of {batch_size}: it counts from 1")
    if rows is None:
        return range(batch_size)
    if not len(rows) or min(rows) < 0 or max(rows) >= batch_size or list(rows) != sorted(set(rows)):
        raise DataError(
            f"rows {rows} of a global batch of {batch_size}: give some of 0 to {batch_size - 1}, "
            "ascending"
        )
    return rows


def place(step: int, row: int, batch_size: int) -> int:
    """The number of an example among those of all steps of a run."""
    return step * batch_size + row


def rng(seed: int, place: int) -> np.random.Generator:
    """The random numbers of a place, independent of those of all others; 8 microseconds."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, place], np.uint64)))


def seed_of(seed: int, k: int) -> int:
    """The seed of source k's shuffle. Hashed: Grain's epochs have seed, seed + 1, ..., so that
    otherwise the run with the next seed would see this run's second epoch first."""
    return int(np.random.SeedSequence([seed, k]).generate_state(1)[0])
