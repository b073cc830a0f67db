"""Global batches of arrays from sources of records, in the order that the law says."""

import contextlib
import logging
import math
import os
import shutil
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from math import prod

import numpy as np

from sslx.data import order
from sslx.data.load import Decode, Load, allowed
from sslx.data.source import DataError, Shapes, Source, Unreachable
from sslx.data.uri import open_uri
from sslx.data.workers import cores, mark_flags_parsed, off_device, spawning

log = logging.getLogger("sslx")
Batch = dict[str, np.ndarray]
PIECE = 4 << 20  # bytes of examples that are read and handed over at a time


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

    def __getstate__(self):
        """Its fields: a copy opens and checks its sources itself."""
        return {x.name: getattr(self, x.name) for x in fields(self)}

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

    @property
    def sources(self) -> int:
        """The number of sources; opens none."""
        return len(self.source) if isinstance(self.source, tuple) else 1

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
        self, seed: int, batch_size: int, start: int = 0, rows: Sequence[int] | None = None
    ) -> "Batches":
        """Batches of steps start, start + 1, ... without end: `decode`'s arrays and maybe label.

        `batch_size` is global. `rows` are those of each batch that are read, in ascending order;
        all by default. A process asks for the rows that its devices hold, and then counts what
        gives way for corrupt records over all processes: `dropped`, float32 [rows, sources], joins
        each batch, and `check_dropped` judges their sum.
        """
        self.check()
        if len(self.mixture) == 1 and batch_size > len(self):
            raise DataError(
                f"{self.source} holds {len(self)} records, fewer than one batch of {batch_size}: "
                "take a smaller batch_size, or more data"
            )
        weights = tuple(weight for _, weight in self.mixture)
        numbers = order.Shuffled(tuple(self.ends), weights, seed, batch_size)
        return self.read(numbers, start, None, rows, self.labels, masked=False)

    def epoch(self, batch_size: int, rows: Sequence[int] | None = None) -> "Batches":
        """Every record once, in order, for evaluation; with `label` if the sources have labels.

        Every batch is full: `valid`, bool [rows], is false for what pads the last one and for what
        stands in for a corrupt record. `rows` as in `batches`.
        """
        steps = -(-len(self) // batch_size) if batch_size > 0 else 0
        return self.read(order.Once(0, batch_size), 0, steps, rows, self.labelled, masked=True)

    def read(self, numbers, start: int, steps: int | None, rows, labels: bool, masked: bool):
        """Batches of examples, read ahead, in the order of `numbers`; endless without `steps`."""
        from grain import MapDataset, MultiprocessingOptions, ReadOptions
        from grain.experimental import DatasetOptions, WithOptionsIterDataset

        whole = order.checked(rows, numbers.batch_size)
        examples = sys.maxsize if steps is None else steps * len(whole)
        workers, piece = self.processes(len(whole), examples)
        sources = tuple(source for source, _ in self.mixture)
        pieces = tuple(whole[i : i + piece] for i in range(0, len(whole), piece))
        load = Load(sources, self.decode, labels, self.max_corrupt, numbers, pieces)
        stop = sys.maxsize if steps is None else (start + steps) * len(pieces)
        dataset = MapDataset.range(start * len(pieces), stop).map(load)
        judge = self.check_dropped if rows is None else None
        if not workers:
            ahead = min(cores(), 8)
            ready = dataset.to_iter_dataset(ReadOptions(ahead, 2 * ahead))
            return Batches(ready, len(pieces), masked, judge)
        mark_flags_parsed()
        one = dataset.to_iter_dataset(ReadOptions(0, 0))  # a worker is one thread
        one = WithOptionsIterDataset(one, DatasetOptions(min_shm_size=1 << 16))
        options = MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        ready = one.mp_prefetch(options, worker_init_fn=off_device)
        return Batches(ready, len(pieces), masked, judge)

    def processes(self, rows: int, examples: int) -> tuple[int, int]:
        """(workers, examples that one of them hands over at a time).

        Workers are as many as asked for, or, where that is faster, one less than cores. A few MiB
        at a time let all of them work on the batch that is waited for, and fit into /dev/shm.
        """
        small = examples < 20_000 or all(source.resident for source, _ in self.mixture)
        few = 0 if small or cores() <= 2 else min(cores() - 1, 32)
        workers = few if self.workers is None else self.workers
        arrays = self.shapes(1).values()
        size = max(1, sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays))
        most = max(1, min(rows, PIECE // size))
        if workers:
            room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else sys.maxsize
            fit = room // (4 * size)  # of each: one made, two waiting, one arriving
            if fit < workers:
                text = f"{workers} workers pass examples of {size / 2**20:.1f} MiB through /dev/shm"
                text += f", which has {room >> 20} MiB: docker run --shm-size=16g, or workers={fit}"
                if self.workers:
                    raise DataError(text)
                log.warning("%s; going on with %d", text, fit)
                workers = fit
            most = max(1, min(most, fit // max(1, workers)))
        return workers, -(-rows // -(-rows // most))

    def check_dropped(
        self, counts: np.ndarray, examples: int, names: Mapping[str, str] | None = None
    ) -> None:
        """Raise DataError where more examples gave way for corrupt records than `max_corrupt` says.

        counts    of each source, over all processes, among the first `examples` of a run
        names     {record: reason} of those that this process knows
        """
        total = sum(weight for _, weight in self.mixture)
        for (source, weight), count in zip(self.mixture, counts, strict=True):
            epochs = max(1, math.ceil(examples * weight / total / len(source)))
            if count > epochs * allowed(self.max_corrupt, source):
                few = "; ".join(f"{n} ({why})" for n, why in list((names or {}).items())[-3:])
                many = f"{count:.0f}" if math.isfinite(count) else "one after another"
                raise DataError(
                    f"{source}: too many of {len(source)} records cannot be decoded, {many} of the "
                    f"first {examples} examples{': ' * bool(few)}{few}. Repair or remove them, or "
                    f"raise max_corrupt"
                )


class Batches(Iterator[Batch]):
    """Batches one after another; `dropped` says what was corrupt so far, {name: reason}.

    With a `judge`, a (counts, examples, names) -> None that raises when that is too much, batches
    are whole and hold no `dropped`. Close it, or use it in `with`, to end its workers at once.
    """

    def __init__(self, dataset, pieces: int, masked: bool, judge=None):
        self.pieces, self.masked, self.judge = pieces, masked, judge
        self.dropped: dict[str, str] = {}
        self.counts, self.examples = 0, 0
        self.elements, self.started = [iter(dataset)], False
        self.close = weakref.finalize(self, end, self.elements)  # when forgotten, and at exit too

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise DataError("these batches were closed; ask the pipeline for new ones")
        with contextlib.nullcontext() if self.started else spawning():
            pieces = [following(self.elements[0])]
        self.started = True
        pieces += [following(self.elements[0]) for _ in range(1, self.pieces)]
        for name, reason in (pair for piece in pieces for pair in piece.pop("names")):
            if name not in self.dropped:
                log.warning("dropped %s, which cannot be decoded: %s", name, reason)
                self.dropped[name] = reason
        batch = {name: joined([piece[name] for piece in pieces]) for name in pieces[0]}
        if not self.masked:
            del batch["valid"]
        if self.judge:
            dropped = batch.pop("dropped")
            self.counts, self.examples = self.counts + dropped.sum(0), self.examples + len(dropped)
            try:
                self.judge(self.counts, self.examples, self.dropped)
            except DataError:
                self.close()
                raise
        return batch

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def following(elements: Iterator) -> dict:
    """The next of a Grain iterator; raises Unreachable where a worker has ended."""
    try:
        return next(elements)
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        what = str(error).split(". ")[0]
        killed = "; the kernel kills so when memory runs out: take fewer of them, data.workers=1,"
        killed += " or none, data.workers=0"
        advice = killed if "-9" in what else "; its own message says why, if it left one"
        raise Unreachable(f"a process that reads data is gone ({what}){advice}") from error


def end(elements: list) -> None:
    """Close a Grain iterator, which would log an error if it were alive at exit."""
    elements.pop().close()


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays end to end as a plain one, which is nothing that lies in a worker's shared memory."""
    [first, *more] = arrays
    if not more and type(first) is np.ndarray:
        return first
    return np.concatenate([np.asarray(array) for array in arrays])
