"""Records to arrays: what decoding is, and how pieces of batches are read, here or in workers."""

import contextlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sslx.data import order
from sslx.data.source import (
    DataError,
    Example,
    Record,
    Shapes,
    Source,
    Unreachable,
    labelled,
    patiently,
)


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
            source.adopt(known)

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
            except DataError as error:
                if type(error) in (DataError, Unreachable):
                    raise
                raise DataError(str(error)) from error  # a worker's must be known where it arrives
            except (Exception, SystemExit) as error:  # decoders raise what they like: SyntaxError
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

    @cached_property
    def promised(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array that the decoder says it makes."""
        return {name: tuple(shape) for name, (shape, _) in self.decode.shapes.items()}

    def decoded(self, record: Record, place: int) -> Example:
        if self.decode is None:
            return {name: x for name, x in record.items() if name not in ("label", "name")}
        example = self.decode(record, order.rng(self.numbers.seed, place))
        made = {name: np.shape(x) for name, x in example.items()}
        if made != self.promised:
            raise DataError(
                f"{self.decode} made {made} of {record['name']}, but its `shapes` are "
                f"{self.promised}: every example has these"
            )
        return example


def allowed(max_corrupt: float, source: Source) -> int:
    """How many records of a source may be corrupt."""
    return max(max_corrupt > 0, int(max_corrupt * len(source)))
