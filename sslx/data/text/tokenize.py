"""Raw text -> windows of tokens, once.

    plan       files are cut into parts of about equal size: whole small files, byte ranges of large
               ones (a line belongs to where it begins), rows of Parquet
    write      each part becomes one shard, alone: so parts run in any process, on any host, in any
               order, and a part that is written need not be written again
    finish     when every shard is there, a manifest says what they hold

A window is filled as RoBERTa's "full sentences" are (arXiv:1907.11692, 4.2): documents one after
another, across their ends. Unlike there each has its own [start] and [end] and attends to itself
alone, and one too long is cut between any two tokens, as BERT cuts, and goes on in the next window;
only room of less than SHORTEST positions is padded instead.

The same files, tokenizer and length give the same bytes, whatever the number of processes.
"""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data.formats.arrayrecord import Shards
from sslx.data.source import DataError, needs
from sslx.data.text.corpus import Tally, batched, texts
from sslx.data.text.files import Span, files, partition
from sslx.data.text.tokenizers import (
    Kind,
    digest,
    tokenizer,
    tokenizer_digest,
    tokenizer_file,
    train_tokenizer,
    vocabulary,
    warn_of_unknown,
)
from sslx.data.text.windows import check_length, packed, record, width
from sslx.data.workers import cores, end_with_parent, spawning

log = logging.getLogger("sslx")

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), for a progress bar

PART = 8 << 20  # bytes of a part; doubled until there are at most PARTS
PARTS = 512  # readers keep as many files open
SAMPLE = 1 << 30  # characters that a tokenizer is trained on, spread over the corpus
BATCH = 1 << 19  # characters encoded together


# ---- writing ----


@dataclass(frozen=True)
class Job:
    """Tokenize `source` into the folder `out`: what any process on any host needs to do its part.

    `out` has a tokenizer.json before the first part is written. Pickles with the plan, once made.
    """

    source: str
    out: str
    length: int = 128
    part: int | None = None  # bytes; None chooses

    def __post_init__(self):
        check_length(self.length)

    @functools.cached_property
    def plan(self) -> tuple[list[list[Span]], dict[str, str]]:
        """The parts of the corpus, and {file: reason} of what is in none."""
        paths, size = files(self.source), self.part or PART
        parts, dropped = partition(paths, size)
        while self.part is None and len(parts) > PARTS:
            size *= 2
            parts, dropped = partition(paths, size)
        return parts, dropped

    @property
    def parts(self) -> list[list[Span]]:
        return self.plan[0]

    def settings(self) -> dict[str, Any]:
        """The settings that the bytes of the shards depend on, beside the tokenizer."""
        stretches = [(span.path, span.begin, span.end) for part in self.parts for span in part]
        folders = {os.path.dirname(path) for path, *_ in stretches}
        root = os.path.commonpath(folders) if folders else ""  # the whole corpus may move
        layout = [(os.path.relpath(path, root or "."), *ends) for path, *ends in stretches]
        layout = json.dumps([layout, list(map(len, self.parts))])
        return {"format": 1, "length": self.length, "source": digest(layout.encode())}

    def shard(self, k: int) -> Path:
        return Path(self.out) / f"tokens-{k:05d}-of-{len(self.parts):05d}.array_record"

    def done(self, k: int) -> dict[str, Any] | None:
        """The counts of shard k, None unless it is written and whole."""
        about = self.shard(k).with_suffix(".json")
        if not about.exists():
            return None
        about, file = json.loads(about.read_text()), self.shard(k)
        size = file.stat().st_size if file.exists() else 0
        same = size == about["bytes"] and about["tokenizer"] == tokenizer_digest(self.out)
        return about if same else None

    def write(self, k: int, progress: Callable[[int], None] = lambda count: None) -> None:
        """Write part k as a shard, under another name until it is whole. Another process that
        writes the same part is waited for, and its shard taken. What is held in memory does not
        depend on the part but for the index of its windows, some 130 bytes each."""
        with alone(Path(self.out), 1 + k):
            if self.done(k) is None:
                self.write_alone(k, progress)
            else:
                progress(sum(span.size for span in self.parts[k]))

    def write_alone(self, k: int, progress: Callable[[int], None]) -> None:
        tally, words = Tally(), tokenizer(self.out)
        special, part = vocabulary(self.out), self.parts[k]
        done, size = 0, sum(span.size for span in part)

        def encoded():
            nonlocal done
            stream = (pair for span in part for pair in texts(span, tally))
            for batch in batched(stream, BATCH):
                given = [text for text, _ in batch]
                codes = words.encode_batch_fast(given, add_special_tokens=False)
                for code, (_, begins) in zip(codes, batch, strict=True):
                    ids = np.array(code.ids, width(special))
                    tally.counts["tokens"] += len(ids)
                    tally.counts["unknown"] += int((ids == special.unknown).sum())
                    yield ids, begins
                count = min(size - done, sum(len(text) for text, _ in batch))
                done += count
                progress(count)

        writer = needs("array_record.python.array_record_module", "array_record").ArrayRecordWriter
        path, new = self.shard(k), self.shard(k).with_suffix(".new")
        file = None
        for window in packed(encoded(), self.length):
            file = file or writer(str(new), "group_size:1,uncompressed")
            file.write(record(window, special))
            tally.counts["windows"] += 1
            tally.counts["segments"] += len(window)
        if file:  # a part without text has no shard
            file.close()
            verify(new, tally.counts["windows"])
            new.replace(path)
        progress(size - done)
        about = {
            "bytes": path.stat().st_size if file else 0,
            "tokenizer": tokenizer_digest(self.out),
            "counts": dict(tally.counts),
            "dropped": tally.dropped,
        }
        write_json(path.with_suffix(".json"), about)

    def finish(self) -> dict[str, Any] | None:
        """Write and return the manifest, or None while parts are missing."""
        known = [self.done(k) for k in range(len(self.parts))]
        if None in known:
            return None
        counts, dropped = Counter(dropped=len(self.plan[1])), dict(self.plan[1])
        shards = []
        for k, about in enumerate(known):
            counts.update(about["counts"])
            dropped |= about["dropped"]
            if windows := about["counts"].get("windows", 0):
                row = {"name": self.shard(k).name, "bytes": about["bytes"], "windows": windows}
                shards.append(row)
        if not shards:
            few = "; ".join(f"{name} {reason}" for name, reason in list(dropped.items())[:3])
            raise DataError(f"{self.source} holds no text: {few}")
        warn_of_unknown(self.out, counts["unknown"], counts["tokens"])
        special = vocabulary(self.out)
        manifest = {
            **self.settings(),
            "vocabulary": asdict(special),
            "tokenizer": tokenizer_digest(self.out),
            "counts": {name: counts[name] for name in COUNTS},
            "shards": shards,
            "dropped": dropped,
        }
        write_json(Path(self.out) / "manifest.json", manifest)
        return manifest

    def sample(self) -> Iterator[str]:
        """Text to train a tokenizer on: of every part its beginning, SAMPLE characters in all."""
        total = sum(span.size for part in self.parts for span in part)
        for part in self.parts:
            room = SAMPLE * sum(span.size for span in part) // max(1, total)
            for text, _ in (pair for span in part for pair in texts(span, Tally())):
                yield text
                room -= len(text)
                if room < 0:
                    break


COUNTS = ("documents", "tokens", "unknown", "windows", "segments", "empty", "dropped")


def tokenize(
    source: str,
    out: str,
    *,
    vocabulary_size: int | None = None,
    tokenizer: str | None = None,
    kind: Kind = "wordpiece",
    length: int = 128,
    workers: int | None = None,
    process: tuple[int, int] = (0, 1),
    part: int | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any] | None:
    """Write `source` as windows of tokens under `out`; interrupted, the same call goes on.

    The tokenizer is trained on the source, or copied from a tokenizer.json. `process` (i, n) does
    every n-th part from part i on, for a corpus that is spread over machines which share `out`.
    Returns the manifest, or None if other processes have not finished.
    """
    job = Job(source, os.path.expanduser(out), length, part)
    index, count = process
    if not 0 <= index < count:
        raise DataError(f"process {index} of {count}: processes count from 0")
    if count > 1 and tokenizer is None:
        raise DataError("several processes need one tokenizer: train it first, then --tokenizer F")
    prepare(job, vocabulary_size, tokenizer, kind)
    todo = range(index, len(job.parts), count)
    sizes = {k: sum(span.size for span in job.parts[k]) for k in todo}
    left = [k for k in todo if job.done(k) is None]
    run(
        job,
        left,
        sum(sizes.values()) - sum(sizes[k] for k in left),
        sum(sizes.values()),
        workers,
        progress,
    )
    return job.finish()


def prepare(
    job: Job,
    vocabulary_size: int | None = None,
    tokenizer: str | None = None,
    kind: Kind = "wordpiece",
) -> None:
    """Make the folder and its tokenizer.json: copied from `tokenizer`, else trained.

    The same command at once, as on every host of a pod, waits here for the first one.
    """
    out, home = Path(job.out), Path(job.out) / "tokenizer.json"
    size = vocabulary_size or 32_768  # not BERT's nor RoBERTa's: these mean their tokenizers
    if tokenizer is None:
        asked = {"kind": kind, "vocabulary_size": size}
    else:
        vocabulary(tokenizer)  # has a mask token, before anything is written
        given = Path(tokenizer_file(tokenizer)).read_bytes()
        asked = {"tokenizer": digest(given)}
    ours = job.settings() | asked
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, 0):
        claim(out, ours)
        if tokenizer is not None:
            replace_with(home, given)
        elif not home.exists():
            replace_with(home, train_tokenizer(job.sample, size, kind).to_str(pretty=True).encode())


@contextlib.contextmanager
def alone(out: Path, what: int) -> Iterator[None]:
    """Hold the lock of that number, which all hosts that share `out` respect.

    A file system that knows no locks lets all pass, and says so: then two of the same command at
    once may fail, as they write the same files.
    """
    with (out / ".lock").open("ab") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, what)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            log.warning("%s cannot be locked: see that no part is written twice at once", out)
        yield


def claim(out: Path, ours: dict[str, Any]) -> None:
    """Make the folder this job's; raise if it is another's."""
    path = out / "job.json"
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if changed:
            raise DataError(
                f"{out} was begun with another {', '.join(changed)}: remove it, or name "
                "another folder"
            )
        return
    if [name for name in os.listdir(out) if name[0] != "."]:
        raise DataError(f"{out} holds other files: name a new folder")
    write_json(path, ours)


def run(
    job: Job, left: list[int], done: int, total: int, workers: int | None, progress: Progress
) -> None:
    """Write the parts `left` in processes, the next one free the next part; 0 for none but this."""
    workers = min(cores() if workers is None else workers, len(left))

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    add(0)
    if workers < 2:
        for k in left:
            job.write(k, add)
        return
    context = multiprocessing.get_context("spawn")
    read, turn, errors = context.Value("q", done), context.Value("q", 0), context.SimpleQueue()
    crew = [
        context.Process(target=labor, args=(job, left, turn, read, errors), daemon=True)
        for _ in range(workers)
    ]
    with spawning():
        for worker in crew:
            worker.start()
    try:
        alive = True
        while alive:
            for worker in crew:
                worker.join(0.1 / workers)
            alive = any(worker.is_alive() for worker in crew)
            progress(read.value, total)
            if not errors.empty():
                raise errors.get()
            if any(worker.exitcode for worker in crew):
                raise DataError(
                    "a worker was killed, perhaps for memory: the same command goes on; "
                    f"fewer than {workers} workers need less"
                )
    finally:
        for worker in crew:
            worker.kill()  # they hear nothing else; what they had not finished is written again
            worker.join()


def labor(job: Job, left: list[int], turn, read, errors) -> None:
    """Write parts in a worker process until none is left."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()

    def add(count: int) -> None:
        with read.get_lock():
            read.value += count

    try:
        while True:
            with turn.get_lock():
                k, turn.value = turn.value, turn.value + 1
            if k >= len(left):
                return
            job.write(left[k], add)
    except Exception as error:
        errors.put(error)


def verify(path: Path, windows: int) -> None:
    """Raise OSError if a shard does not hold what was written, as on a full disk."""
    if Shards([str(path)]).ends[-1] != windows:
        raise OSError(f"{path} does not hold its {windows} windows: is the disk full?")


def replace_with(path: Path, data: bytes) -> None:
    """Write the whole file or nothing; two processes may write the same file at once."""
    new = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.new")
    new.write_bytes(data)
    new.replace(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    replace_with(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
