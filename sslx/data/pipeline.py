"""Global batches of arrays from sources of records, in the order that the law says."""

import contextlib
import logging
import os
import shutil
import sys
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sslx.data import order
from sslx.data.source import DataError, Example, Record, Shapes, Source, labelled, patiently
from sslx.data.uri import open_uri
from sslx.data.workers import cores, mark_flags_parsed, off_device, spawning

log = logging.getLogger("sslx")
Batch = dict[str, np.ndarray]


@runtime_checkable
class Decode(Protocol):
    """Turns a record into an example, a dict of arrays.

    shapes  the shape and dtype of each of them, known before any record is read
    reads   names of what it reads of a record

    `rng` depends on the run's seed and the example's place in the run, step * batch_size + row,
    alone; it is for random clips, crops of audio, spans.
    """

    shapes: Shapes
    reads: tuple[str, ...]

    def __call__(self, record: Record, rng: np.random.Generator) -> Example: ...


@dataclass(frozen=True)
class Pipeline:
    """Batches of arrays from a source, or from a mixture ((source, weight), ...).

    source       Source or URI; a mixture draws from each by its weight, each in its own epochs
    decode       (record, rng) -> example, a dict of arrays of one fixed shape; None takes the
                 arrays of an in-memory source as they are
    labels       whether training batches have a `label`; those of an evaluation have it anyway
    max_corrupt  share of a source's records that may be undecodable before the run stops; any
                 share but 0 allows one record
    workers      processes that read and decode, 0 for threads in this one; None chooses. As in
                 every program that starts processes, a script that trains needs
                 `if __name__ == "__main__":`
    """

    source: str | Source | tuple[tuple[str | Source, float], ...]
    decode: Decode | None = None
    labels: bool = False
    max_corrupt: float = 0.01
    workers: int | None = field(default=None, compare=False)

    @cached_property
    def mixture(self) -> tuple[tuple[Source, float], ...]:
        pairs = self.source if isinstance(self.source, tuple) else ((self.source, 1.0),)
        opened = []
        for source, weight in pairs:
            if not weight > 0:
                raise DataError(f"the weight of {source} is {weight}: weights are above zero")
            if isinstance(source, str):
                source = open_uri(source)
            elif not isinstance(source, Source):
                raise DataError(
                    f"a {type(source).__name__} is no source: give a URI such as digits:train, or "
                    "arrays by the names of the leaves, sslx.arrays(image=x)"
                )
            else:
                source.check()
            if self.decode is None:
                _ = source.shapes  # raises where records are no arrays
            else:
                source.suits(self.decode)
            opened.append((source, weight))
        return tuple(opened)

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(len(source) for source, _ in self.mixture))

    def __len__(self) -> int:
        """Records in all the sources together."""
        return self.ends[-1]

    @cached_property
    def unlabelled(self) -> str:
        """Why records have no labels; empty if they have."""
        return next((reason for source, _ in self.mixture if (reason := source.unlabelled)), "")

    @property
    def labelled(self) -> bool:
        return not self.unlabelled

    @cached_property
    def classes(self) -> list[str]:
        """The names of the labels 0, 1, ..., the same in all sources; empty without names."""
        first, *others = [(source, source.classes) for source, _ in self.mixture]
        for source, classes in others:
            if classes != first[1]:
                raise DataError(
                    f"{first[0]} and {source} have other classes, {', '.join(first[1][:9])} and "
                    f"{', '.join(classes[:9])}: give labelled sources of a mixture the same ones"
                )
        return first[1]

    def check(self) -> None:
        """Raise DataError now for what can be known to fail later: opens every source."""
        _ = self.mixture
        if self.labels and not self.labelled:
            raise DataError(
                f"{self.source} has records without a label, for {self.unlabelled}: "
                "use labels=False"
            )
        _ = self.labels and self.classes

    def shapes(self, batch_size: int) -> Shapes:
        """Shape and dtype of every array of a global batch; reads no data."""
        label = {"label": ((), np.int32)} if self.labels else {}
        example = {**self.example, **label}
        return {name: ((batch_size, *shape), dtype) for name, (shape, dtype) in example.items()}

    @property
    def example(self) -> Shapes:
        """Shape and dtype of every array of an example."""
        if self.decode is not None:
            return self.decode.shapes
        shapes = [source.shapes for source, _ in self.mixture]
        if any(other != shapes[0] for other in shapes):
            raise DataError(f"the sources of a mixture hold arrays of other shapes: {shapes}")
        return shapes[0]

    def batches(
        self, seed: int, batch_size: int, start: int = 0, host: int = 0, hosts: int = 1
    ) -> "Batches":
        """Batches of steps start, start + 1, ... without end: `decode`'s arrays and maybe label.

        `batch_size` is global; of it this host gets its `batch_size / hosts` consecutive examples,
        so the hosts' shares laid end to end in host order are the global batch.
        """
        self.check()
        local = order.share(batch_size, host, hosts)
        if len(self.mixture) == 1 and batch_size > len(self):
            raise DataError(
                f"{self.source} holds {len(self)} records, fewer than one batch of {batch_size}: "
                "take a smaller batch_size, or more data"
            )
        places = order.Places(seed, batch_size, start, host * local)
        weights = [weight for _, weight in self.mixture]
        steps = order.training(self.ends, weights, places, local, host, hosts)
        return self.read(steps, places, local, self.labels, masked=False)

    def epoch(self, batch_size: int, host: int = 0, hosts: int = 1) -> "Batches":
        """Every record once, in order, for evaluation; with `label` if the sources have labels.

        Every batch is full: `valid`, bool [B], is false for what pads the last one and for what
        stands in for a corrupt record.
        """
        local = order.share(batch_size, host, hosts)
        places = order.Places(0, batch_size, 0, host * local)
        steps = order.evaluation(len(self), batch_size, local, host, hosts)
        return self.read(steps, places, local, self.labelled, masked=True)

    def read(
        self, steps, places: order.Places, local: int, labels: bool, masked: bool
    ) -> "Batches":
        """Batches of examples, read ahead, from batches of record numbers."""
        from grain import MultiprocessingOptions, ReadOptions
        from grain.experimental import DatasetOptions, WithOptionsIterDataset

        sources = tuple(source for source, _ in self.mixture)
        load = Load(sources, self.decode, labels, self.max_corrupt, places)
        steps = steps.map_with_index(load)
        workers = self.processes(local, min(len(steps) * local, sys.maxsize))
        if not workers:
            ahead = min(cores(), 8)
            return Batches(steps.to_iter_dataset(ReadOptions(ahead, ahead)), load, masked)
        mark_flags_parsed()
        one = steps.to_iter_dataset(ReadOptions(0, 0))  # a worker is one thread
        one = WithOptionsIterDataset(one, DatasetOptions(min_shm_size=1 << 16))
        options = MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        return Batches(one.mp_prefetch(options, worker_init_fn=off_device), load, masked)

    def processes(self, local: int, records: int) -> int:
        """The number of workers: as asked, or, where that is faster, one less than cores."""
        small = records < 20_000 or all(source.resident for source, _ in self.mixture)
        few = 0 if small or cores() <= 2 else min(cores() - 1, 32)
        workers = few if self.workers is None else self.workers
        arrays = self.shapes(local).values()
        size = sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)
        room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else sys.maxsize
        fit = max(0, room // (4 * size) - 1)  # of each: one made, two waiting, one arriving
        if self.workers and workers > fit:
            raise DataError(
                f"{workers} workers pass batches of {size >> 20} MiB through /dev/shm, which has "
                f"{room >> 20} MiB: docker run --shm-size=16g, or workers={fit}"
            )
        return min(workers, fit)


@dataclass(frozen=True)
class Load:
    """Reads the batch of given record numbers [B], with `valid` and what was `dropped` on the way.

    A record that cannot be read or decoded gives way to the next one of its source, which depends
    on nothing but the records; so the law holds with corrupt data too.
    """

    sources: tuple[Source, ...]
    decode: Decode | None
    labels: bool
    max_corrupt: float
    places: order.Places

    def __getstate__(self):
        return vars(self), [source.listings() for source in self.sources]

    def __setstate__(self, state):
        """Workers list and count nothing again, and so see the same records as each other."""
        vars(self).update(state[0])
        for source, known in zip(self.sources, state[1], strict=True):
            vars(source).update(known)

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(map(len, self.sources)))

    def limit(self, k: int) -> int:
        """How many corrupt records source k may have."""
        return max(self.max_corrupt > 0, int(self.max_corrupt * len(self.sources[k])))

    def __call__(self, step: int, indices: np.ndarray) -> dict[str, Any]:
        if self.decode is None and len(self.sources) == 1:
            return self.gathered(indices)
        indices, dropped, examples, valid = indices.tolist(), {}, [], []
        located = [self.locate(index) for index in indices]
        records = self.records(located)
        places = self.places.of(step, len(indices))
        for index, (k, at), place in zip(indices, located, places, strict=True):
            beyond = index >= self.ends[-1]  # pads an epoch: any example will do
            if not (beyond and examples):
                example, hops = self.example(k, at, place, records, dropped)
            examples.append(example)
            valid.append(not beyond and not hops)
        batch = {name: np.stack([e[name] for e in examples]) for name in examples[0]}
        return {**batch, "valid": np.array(valid), "dropped": tuple(dropped.items())}

    def gathered(self, indices: np.ndarray) -> dict[str, Any]:
        """The batch of a source of arrays, by one indexing of each."""
        [source] = self.sources
        arrays = source.gather(indices % self.ends[-1])
        label = arrays.pop("label", None)
        if self.labels:
            missing = np.full(len(indices), -1, np.int32)
            arrays["label"] = missing if label is None else label.astype(np.int32)
        return {**arrays, "valid": indices < self.ends[-1], "dropped": ()}

    def locate(self, index: int) -> tuple[int, int]:
        """The source that holds a record number over all sources, and the number there."""
        index %= self.ends[-1]
        k = bisect_right(self.ends, index)
        return k, index - (self.ends[k - 1] if k else 0)

    def records(self, located: list[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        """The records of a batch by (source, number), without sources that fail as a whole."""
        records = {}
        for k, source in enumerate(self.sources):
            wanted = sorted({at for j, at in located if j == k})
            with contextlib.suppress(Exception):  # read one by one, the bad record has a name
                records |= zip([(k, at) for at in wanted], source.records(wanted), strict=True)
        return records

    def example(
        self, k: int, first: int, place: int, records: dict, dropped: dict
    ) -> tuple[Example, int]:
        """The first good example of source k from `first` on, and how many were not."""
        source, bad = self.sources[k], {}
        for hops in range(min(self.limit(k) + 1, len(source))):
            at = (first + hops) % len(source)
            record = records.get((k, at))
            try:
                record = record or patiently(source, at, source.__getitem__, at)
                example = patiently(source, at, self.decoded, record, place)
            except DataError:
                raise
            except Exception as error:  # decoders raise what they like: SyntaxError, struct.error
                name = record["name"] if record else f"{source}#{at}"
                bad[k, name] = f"{type(error).__name__}: {error}"
                continue
            if self.labels:
                known = labelled(record.get("label"), record.get("name", f"record {at}"))
                example = {**example, "label": np.int32(known.get("label", -1))}
            dropped.update(bad)
            return example, hops
        raise too_many({name: reason for (_, name), reason in bad.items()}, source)

    def decoded(self, record: Record, place: int) -> Example:
        if self.decode is None:
            return {name: x for name, x in record.items() if name not in ("label", "name")}
        return self.decode(record, self.places.rng(place))


class Batches(Iterator[Batch]):
    """Batches one after another; `dropped` says what was corrupt so far, {name: reason}.

    Close it, or use it in `with`, to end its workers at once.
    """

    def __init__(self, dataset, load: Load, masked: bool):
        self.load, self.masked = load, masked
        self.dropped: dict[str, str] = {}
        self.counts = Counter()
        self.elements, self.started = [iter(dataset)], False
        self.close = weakref.finalize(self, end, self.elements)  # when forgotten, and at exit too

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise DataError("these batches were closed; ask the pipeline for new ones")
        with contextlib.nullcontext() if self.started else spawning():
            batch = next(self.elements[0])
        self.started = True
        for (k, name), reason in batch.pop("dropped"):
            self.drop(k, name, reason)
        if not self.masked:
            del batch["valid"]
        return {name: owned(array) for name, array in batch.items()}

    def drop(self, k: int, name: str, reason: str) -> None:
        if name in self.dropped:
            return
        log.warning("dropped %s, which cannot be decoded: %s", name, reason)
        self.dropped[name] = reason
        self.counts[k] += 1
        if self.counts[k] > self.load.limit(k):
            self.close()
            raise too_many(self.dropped, self.load.sources[k])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def end(elements: list) -> None:
    """Close a Grain iterator, which would log an error if it were alive at exit."""
    elements.pop().close()


def too_many(dropped: Mapping[str, str], source: Source) -> DataError:
    """The error for more corrupt records than allowed."""
    few = "; ".join(f"{name} ({reason})" for name, reason in list(dropped.items())[-3:])
    return DataError(
        f"{source}: too many of {len(source)} records cannot be decoded, {len(dropped)} so far: "
        f"{few}. Repair or remove them, or raise max_corrupt"
    )


def owned(array: np.ndarray) -> np.ndarray:
    """The array as a plain one; copied where it lies in a worker's shared memory."""
    return array if type(array) is np.ndarray else np.array(array)
