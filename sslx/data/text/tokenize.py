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

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sslx.data.source import DataError
from sslx.data.text.folder import alone, write_bytes, writing
from sslx.data.text.job import Job, claim
from sslx.data.text.tokenizers import (
    Kind,
    check_size,
    digest,
    tokenizer_file,
    train_tokenizer,
    vocabulary,
)
from sslx.data.workers import cores, end_with_parent, spawning

log = logging.getLogger("sslx")

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), for a progress bar


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

    Both may be written as recipes name them, `text:GLOB?tokenizer=F` and `tokens:DIR`. The
    tokenizer is trained on the source, or copied from a tokenizer.json. `process` (i, n) does every
    n-th part from part i on, for a corpus that is spread over machines which share `out`. Returns
    the manifest, or None if other processes have not finished.
    """
    source, _, named = bare("text", source).partition("?tokenizer=")
    if vocabulary_size is None:
        tokenizer = tokenizer or named or None
    job = Job(source, os.path.expanduser(bare("tokens", out)), length, part)
    index, count = process
    if not 0 <= index < count:
        raise DataError(f"process {index} of {count}: processes count from 0")
    if workers is not None and workers < 0:
        raise DataError(f"{workers} workers: 0 is this process alone, None one for each core")
    if count > 1 and tokenizer is None:
        raise DataError("several processes need one tokenizer: train it first, then --tokenizer F")
    prepare(job, vocabulary_size, tokenizer and bare("tokens", tokenizer), kind)
    todo = range(index, len(job.parts), count)
    sizes = {k: sum(span.size for span in job.parts[k]) for k in todo}
    left = [k for k in todo if not job.done(k)]
    if changed := sum(job.written(k) is not None for k in left):
        log.warning("%s: %d parts are written again, for their files have changed", out, changed)
    if left:
        job.check_cover()
    run(
        job,
        left,
        sum(sizes.values()) - sum(sizes[k] for k in left),
        sum(sizes.values()),
        workers,
        progress,
    )
    return job.finish()


def bare(scheme: str, name: str) -> str:
    """A path that may be written as a source, `SCHEME:PATH`."""
    return name if os.path.exists(name) else name.removeprefix(f"{scheme}:")


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
    # By default neither BERT's nor RoBERTa's: these mean their tokenizers.
    size = 32_768 if vocabulary_size is None else vocabulary_size
    if tokenizer is None:
        check_size(size, kind)
        asked = {"kind": kind, "vocabulary_size": size}
    else:
        vocabulary(tokenizer)  # has a mask token, before anything is written
        given = Path(tokenizer_file(tokenizer)).read_bytes()
        asked = {"tokenizer": digest(given)}
    ours = job.settings() | asked
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with alone(out, 0):
        claim(out, ours)
        if tokenizer is not None:
            write_bytes(home, given)
        elif not home.exists():
            write_bytes(home, train_tokenizer(job.sample, size, kind).to_str(pretty=True).encode())


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
