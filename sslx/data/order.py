"""The law: which record stands at which row of which step, from (seed, step, row) alone.

It knows nothing of hosts, workers, devices and restarts. Only numbers of records are shuffled,
mixed and batched here; reading them is the pipeline's.
"""

from dataclasses import dataclass

import numpy as np

from sslx.data.source import DataError


@dataclass(frozen=True)
class Places:
    """Numbers the examples of all steps of a run: row r of step s is at s * batch_size + r."""

    seed: int
    batch_size: int  # global
    start: int  # the first step that is read
    first: int  # the first row of this host

    def of(self, index: int, examples: int) -> range:
        """The places of the `examples` that this host has in the index-th step that is read."""
        begin = (self.start + index) * self.batch_size + self.first
        return range(begin, begin + examples)

    def rng(self, place: int) -> np.random.Generator:
        """The random numbers of a place, independent of those of all others; 8 microseconds."""
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, place], np.uint64)))


def training(
    ends: list[int], weights: list[float], places: Places, local: int, host: int, hosts: int
):
    """A Grain dataset of record numbers int [local], one element a step, from `places.start` on.

    `ends` are where each source's records end. Each source is permuted anew in every epoch; several
    are mixed by weight.
    """
    import grain

    orders = [
        grain.MapDataset.range(begin, end).shuffle(seed=seed_of(places.seed, k)).repeat()
        for k, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)
    return order.batch(local, drop_remainder=True, batch_fn=np.array)[host::hosts][places.start :]


def evaluation(records: int, batch_size: int, local: int, host: int, hosts: int):
    """A Grain dataset of record numbers int [local] that goes once through all, in order.

    Numbers from `records` on fill up the last batch.
    """
    import grain

    padded = -(-records // batch_size) * batch_size
    return grain.MapDataset.range(padded).batch(local, batch_fn=np.array)[host::hosts]


def share(batch_size: int, host: int, hosts: int) -> int:
    """Examples that a host holds of each global batch."""
    if batch_size < 1 or batch_size % hosts:
        raise DataError(f"a global batch of {batch_size} does not divide among {hosts} hosts")
    if not 0 <= host < hosts:
        raise DataError(f"host {host} of {hosts}: hosts count from 0")
    return batch_size // hosts


def seed_of(seed: int, k: int) -> int:
    """The seed of source k's shuffle. Hashed: Grain's epochs have seed, seed + 1, ..., so that
    otherwise the run with the next seed would see this run's second epoch first."""
    return int(np.random.SeedSequence([seed, k]).generate_state(1)[0])
