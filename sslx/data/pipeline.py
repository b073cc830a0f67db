"""Records -> global batches, by law.

Which examples are in the global batch of step s, in which order, is a pure function of (seed, step,
mixture, global batch size): it knows nothing of hosts, workers and restarts. Only numbers of
records are shuffled, mixed and batched; one map at the end reads a whole batch of them.
"""

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import prod
from multiprocessing import resource_tracker
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sslx.data import sources
from sslx.data.sources import DataError, Source

log = logging.getLogger("sslx")
Batch = dict[str, np.ndarray]


@runtime_checkable
class Decode(Protocol):
    """Record -> example, a dict of arrays; `shapes` knows theirs and dtypes before any is read."""

    shapes: dict[str, tuple[tuple[int, ...], type]]

    def __call__(self, record: dict[str, Any]) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Pipeline:
    """A source, or a mixture ((source, weight), ...), decoded into batches of arrays.

    source       Source or URI; a mixture draws from each by its weight, each in its own epochs
    decode       record -> example, a dict of arrays of one fixed shape
    labels       whether batches carry `label`; pretraining batches carry none at all
    max_corrupt  share of a source's records that may be undecodable before the run stops; any
                 share but 0 allows one record
    workers      processes that read and decode, 0 for threads in this one; None chooses
    """

    source: str | Source | tuple[tuple[str | Source, float], ...]
    decode: Decode
    labels: bool = False
    max_corrupt: float = 0.01
    workers: int | None = field(default=None, compare=False)

    @cached_property
    def mixture(self) -> tuple[tuple[Source, float], ...]:
        parts = self.source if isinstance(self.source, tuple) else ((self.source, 1.0),)
        opened = []
        for source, weight in parts:
            if not weight > 0:
                raise DataError(f"the weight of {source} is {weight}: weights are above zero")
            if isinstance(source, str):
                source = sources.open(source)
            else:
                source.check()
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
    def labelled(self) -> bool:
        return all("label" in source[0] for source, _ in self.mixture)

    def check(self) -> None:
        """Raise DataError now for what can be known to fail later: opens every source."""
        _ = self.mixture
        if self.labels and not self.labelled:
            raise DataError(f"{self.source} has records without a label: use labels=False")

    def shapes(self, batch_size: int) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and dtype of every array of a global batch; reads no data."""
        label = {"label": ((), np.int32)} if self.labels else {}
        example = {**self.decode.shapes, **label}
        return {name: ((batch_size, *shape), dtype) for name, (shape, dtype) in example.items()}

    def batches(
        self, seed: int, batch_size: int, start: int = 0, host: int = 0, hosts: int = 1
    ) -> "Batches":
        """Batches of steps start, start + 1, ... without end: `decode`'s arrays and maybe label.

        `batch_size` is global; of it this host gets its `batch_size / hosts` consecutive examples,
        so the hosts' parts laid end to end in host order are the global batch.
        """
        import grain

        self.check()
        local = part(batch_size, host, hosts)
        if len(self.mixture) == 1 and batch_size > len(self):
            raise DataError(
                f"{self.source} holds {len(self)} records, fewer than one batch of {batch_size}: "
                "take a smaller batch_size, or more data"
            )
        orders = [
            grain.MapDataset.range(begin, end).shuffle(seed=seed_of(seed, k)).repeat()
            for k, (begin, end) in enumerate(zip([0, *self.ends], self.ends, strict=False))
        ]
        weights = [weight for _, weight in self.mixture]
        order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)
        steps = order.batch(local, drop_remainder=True, batch_fn=np.array)[host::hosts][start:]
        return self.run(steps, local, self.labels, masked=False)

    def epoch(self, batch_size: int, host: int = 0, hosts: int = 1) -> "Batches":
        """Every record once, in order, for evaluation; with `label` if the sources have labels.

        Every batch is full: `valid`, bool [B], is false for what pads the last one and for what
        stands in for a corrupt record.
        """
        import grain

        local = part(batch_size, host, hosts)
        padded = -(-len(self) // batch_size) * batch_size
        steps = grain.MapDataset.range(padded).batch(local, batch_fn=np.array)[host::hosts]
        return self.run(steps, local, self.labelled, masked=True)

    def run(self, steps, local: int, labels: bool, masked: bool) -> "Batches":
        """Batches of record numbers -> batches of examples, read ahead."""
        from grain import MultiprocessingOptions, ReadOptions
        from grain.experimental import DatasetOptions, WithOptionsIterDataset

        load = Load(tuple(s for s, _ in self.mixture), self.decode, labels, self.max_corrupt)
        steps = steps.map(load)
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
        """How many workers: as asked, or one for each core but one where that repays its start."""
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
    """Record numbers [B] -> batch, `valid`, and what was `dropped` on the way.

    A record that cannot be read or decoded gives way to the next one of its source, which depends
    on nothing but the records; so the law holds with corrupt data too.
    """

    sources: tuple[Source, ...]
    decode: Decode
    labels: bool
    max_corrupt: float

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(map(len, self.sources)))

    def limit(self, k: int) -> int:
        """How many corrupt records source k may have."""
        return max(self.max_corrupt > 0, int(self.max_corrupt * len(self.sources[k])))

    def __call__(self, indices: np.ndarray) -> dict[str, Any]:
        indices, dropped, examples, valid = indices.tolist(), {}, [], []
        places = [self.place(index) for index in indices]
        records = self.records(places)
        for index, place in zip(indices, places, strict=True):
            beyond = index >= self.ends[-1]  # pads an epoch: any example will do
            if not (beyond and examples):
                example, hops = self.example(*place, records, dropped)
            examples.append(example)
            valid.append(not beyond and not hops)
        batch = {name: np.stack([e[name] for e in examples]) for name in examples[0]}
        return {**batch, "valid": np.array(valid), "dropped": tuple(dropped.items())}

    def place(self, index: int) -> tuple[int, int]:
        """A number over all sources -> (source, number in it)."""
        index %= self.ends[-1]
        k = bisect_right(self.ends, index)
        return k, index - (self.ends[k - 1] if k else 0)

    def records(self, places: list[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        """What one reading of each source gives; nothing of a source where that fails."""
        found = {}
        for k, source in enumerate(self.sources):
            wanted = sorted({at for j, at in places if j == k})
            with contextlib.suppress(Exception):  # read one by one, the bad record has a name
                found |= zip([(k, at) for at in wanted], source.records(wanted), strict=True)
        return found

    def example(
        self, k: int, first: int, records: dict, dropped: dict
    ) -> tuple[dict[str, np.ndarray], int]:
        """The first good example of source k from `first` on, and how many were not."""
        source, bad = self.sources[k], {}
        for hops in range(min(self.limit(k) + 1, len(source))):
            at = (first + hops) % len(source)
            record = records.get((k, at))
            try:
                record = record or read(source, at)
                example = self.decode(record)
            except DataError:
                raise
            except Exception as error:  # decoders raise what they like: SyntaxError, struct.error
                name = record["name"] if record else f"{source}#{at}"
                bad[k, name] = f"{type(error).__name__}: {error}"
                continue
            if self.labels:
                example = {**example, "label": np.int32(record.get("label", -1))}
            dropped.update(bad)
            return example, hops
        raise too_many({name: reason for (_, name), reason in bad.items()}, source)


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
    """Stop a Grain iterator and let go of it: alive at exit, it would complain."""
    elements.pop().close()


def owned(array: np.ndarray) -> np.ndarray:
    """A worker's array without Grain's wrapper: its segment has lost its name already, so nothing
    is left behind however the program ends, and lives as long as the array."""
    memory = getattr(array, "shm", None)
    if memory is None:
        return array
    array._unlink_on_del = False
    memory.unlink()
    plain = np.ndarray(array.shape, array.dtype, buffer=memory._mmap)
    memory.buf.release()
    memory._buf = memory._mmap = None  # the mapping is the array's now; close() keeps off it
    return plain


def read(source: Source, index: int) -> dict[str, Any]:
    """source[index]; a file that went away stops the run, as skipping it would break the law."""
    try:
        return source[index]
    except OSError as error:
        raise DataError(
            f"{source}: record {index} became unreadable during the run ({error}); "
            "restore the file and resume"
        ) from error


def too_many(dropped: Mapping[str, str], source: Source) -> DataError:
    """The error for more corrupt records than allowed."""
    few = "; ".join(f"{name} ({reason})" for name, reason in list(dropped.items())[-3:])
    return DataError(
        f"{source}: too many of {len(source)} records cannot be decoded, {len(dropped)} so far: "
        f"{few}. Repair or remove them, or raise max_corrupt"
    )


def part(batch_size: int, host: int, hosts: int) -> int:
    """Examples a host holds of each global batch."""
    if batch_size < 1 or batch_size % hosts:
        raise DataError(f"a global batch of {batch_size} does not divide among {hosts} hosts")
    if not 0 <= host < hosts:
        raise DataError(f"host {host} of {hosts}: hosts count from 0")
    return batch_size // hosts


def seed_of(seed: int, k: int) -> int:
    """The shuffle of source k. Hashed: Grain's epochs are seed, seed + 1, ..., so that otherwise
    the run with the next seed would see this run's second epoch first."""
    return int(np.random.SeedSequence([seed, k]).generate_state(1)[0])


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def off_device(worker: int, workers: int) -> None:
    """In a worker: it ends with its parent, and should anything start jax there, it must not take
    the accelerator."""
    del worker, workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # Grain has imported it, and with it read the environment
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def end_with_parent() -> None:
    """A parent killed outright tells nobody."""
    multiprocessing.parent_process().join()
    os._exit(1)


def mark_flags_parsed() -> None:
    """Grain reads absl flags, which nobody parses outside an absl program."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def spawning():
    """Workers started within never hear Ctrl-C and SIGTERM, which go to all processes of a terminal
    or job: when they end is for the run to say, once it has saved what it reached."""
    resource_tracker.ensure_running()  # started later, it would let the signals through again
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        with without_main():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


@contextlib.contextmanager
def without_main():
    """Keep spawned workers from running the user's program again: they have no need of it, as
    what is defined there is pickled whole, and a script without the __main__ guard would fork."""
    main = sys.modules["__main__"]
    hidden = {
        name: main.__dict__.pop(name) for name in ("__spec__", "__file__") if name in vars(main)
    }
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update({"__spec__": None} | hidden)
