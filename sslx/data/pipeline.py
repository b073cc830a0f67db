"""Global batches of arrays from sources of records, in the order that the law says."""

import contextlib
import logging
import math
import os
import shutil
import sys
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
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
PIECE = 4 << 20  # bytes of examples that are read and handed over at a time


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


@dataclass(frozen=True)
class Load:
    """Reads piece after piece of batches: piece i % len(pieces) of step i // len(pieces).

    A record that cannot be read or decoded gives way to the next one of its source, which depends
    on nothing but the records; so the law holds with corrupt data too. `dropped`, float32 [rows,
    sources], is 1 where one did, infinite where none nearby is better; `names` are theirs.
    """

    sources: tuple[Source, ...]
    decode: Decode | None
    labels: bool
    max_corrupt: float
    numbers: order.Shuffled | order.Once
    pieces: tuple[Sequence[int], ...]  # rows

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

    def __call__(self, i: int) -> dict[str, Any]:
        step, piece = divmod(i, len(self.pieces))
        rows = self.pieces[piece]
        indices = self.numbers(step, rows)
        dropped = np.zeros((len(rows), len(self.sources)), np.float32)
        if self.decode is None and len(self.sources) == 1:
            return {**self.gathered(indices), "dropped": dropped, "names": ()}
        indices, names, examples, valid = indices.tolist(), {}, [], []
        located = [self.locate(index) for index in indices]
        records = self.records(located)
        for row, index, (k, at), out in zip(rows, indices, located, dropped, strict=True):
            beyond = index >= self.ends[-1]  # pads an epoch: any example will do
            if not (beyond and examples):
                where = order.place(step, row, self.numbers.batch_size)
                example, lost = self.example(k, at, where, records, names)
            out[k] = 0 if beyond else lost
            examples.append(example)
            valid.append(not beyond and not lost)
        batch = {name: np.stack([e[name] for e in examples]) for name in examples[0]}
        return {
            **batch,
            "valid": np.array(valid),
            "dropped": dropped,
            "names": tuple(names.items()),
        }

    def gathered(self, indices: np.ndarray) -> dict[str, Any]:
        """The batch of a source of arrays, by one indexing of each."""
        [source] = self.sources
        arrays = source.gather(indices % self.ends[-1])
        label = arrays.pop("label", None)
        if self.labels:
            missing = np.full(len(indices), -1, np.int32)
            arrays["label"] = missing if label is None else label.astype(np.int32)
        return {**arrays, "valid": indices < self.ends[-1]}

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
        self, k: int, first: int, place: int, records: dict, names: dict
    ) -> tuple[Example, float]:
        """The first good example of source k from `first` on, and 1 if that is another record; a
        blank one and infinity where more are bad in a row than there may be in all."""
        source = self.sources[k]
        for hops in range(min(allowed(self.max_corrupt, source) + 1, len(source))):
            at = (first + hops) % len(source)
            record = records.get((k, at))
            try:
                record = record or patiently(source, at, source.__getitem__, at)
                example = patiently(source, at, self.decoded, record, place)
            except DataError:
                raise
            except Exception as error:  # decoders raise what they like: SyntaxError, struct.error
                name = record["name"] if record else f"{source}#{at}"
                names[name] = f"{type(error).__name__}: {error}"
                continue
            if self.labels:
                known = labelled(record.get("label"), record.get("name", f"record {at}"))
                example = {**example, "label": np.int32(known.get("label", -1))}
            return example, float(hops > 0)
        shapes = source.shapes if self.decode is None else self.decode.shapes
        shapes = shapes | ({"label": ((), np.int32)} if self.labels else {})
        return {name: np.zeros(*shape) for name, shape in shapes.items()}, np.inf

    def decoded(self, record: Record, place: int) -> Example:
        if self.decode is None:
            return {name: x for name, x in record.items() if name not in ("label", "name")}
        return self.decode(record, order.rng(self.numbers.seed, place))


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
            pieces = [next(self.elements[0])]
        self.started = True
        pieces += [next(self.elements[0]) for _ in range(1, self.pieces)]
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


def end(elements: list) -> None:
    """Close a Grain iterator, which would log an error if it were alive at exit."""
    elements.pop().close()


def allowed(max_corrupt: float, source: Source) -> int:
    """How many records of a source may be corrupt."""
    return max(max_corrupt > 0, int(max_corrupt * len(source)))


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays end to end as a plain one, which is nothing that lies in a worker's shared memory."""
    [first, *more] = arrays
    if not more and type(first) is np.ndarray:
        return first
    return np.concatenate([np.asarray(array) for array in arrays])
