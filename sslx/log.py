"""Logging of a run: progress bar, metrics.jsonl, TensorBoard, pictures; by process 0 only."""

import contextlib
import errno
import io
import itertools
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sslx.console import lasting
from sslx.paths import Place, Remote

Read = TypeVar("Read")
Value = float | np.ndarray  # a number, or a uint8 picture [H, W, C]

BLOCK = 2**23  # bytes of an object in a bucket that grows, before the next one begins
EVERY = 60.0  # seconds between two writings of it, beside those before checkpoints

log = logging.getLogger("sslx")


def write_whole(path: Place, content: str | bytes) -> None:
    """Write the whole file or none of it: a kill, a full disk or a lost machine leaves what was
    there."""
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        return
    if isinstance(path, Remote):
        return path.write_bytes(data)
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a rename may outlive a power cut, and the bytes not
        new.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write names no file


def write_picture(run: Place, name: str, image: np.ndarray) -> Place:
    """Write a uint8 picture [H, W, C] to pictures/NAME.png of a run; returns its path."""
    path = run / "pictures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, png(image))
    return path


def picture(image: np.ndarray) -> Image.Image:
    """A uint8 array [H, W, 1 or 3] as a Pillow picture."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def png(image: np.ndarray) -> bytes:
    """A uint8 array [H, W, 1 or 3] as a PNG file."""
    file = io.BytesIO()
    picture(image).save(file, "PNG")
    return file.getvalue()


def step_rows(run: Place) -> Iterator[dict[str, Any]]:
    """The rows of a run's metrics; says how many lines are none, cut by a kill or odd."""
    path, odd = run / "metrics.jsonl", 0
    text = "".join(part.read_text(errors="replace") for part in blocks(path))
    for line in text.splitlines(keepends=True):
        try:
            row = json.loads(line if line.endswith("\n") else "")
            _ = [float(value) for value in row.values()], row["step"] + 0
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            odd += 1
        else:
            yield row
    if odd:
        log.warning("%s: lines that are no rows, and are left out: %d", path, odd)


def read_json(path: Place, none: Read, checked: Callable[[Any], Read] = lambda x: x) -> Read:
    """What `checked` makes of a file of JSON; `none` where there is no file, and where it cannot be
    read, is of another type, or `checked` refuses it: then it is put aside, and that is said."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, type(none)):
            raise ValueError(f"it is no {type(none).__name__}")
        return checked(content)
    except FileNotFoundError:
        return none
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and isinstance(path, Remote):
            raise  # out of reach, and not damaged
        aside = path.with_name(path.name.removesuffix(".json") + ".damaged.json")
        log.warning("%s is damaged (%s): put aside as %s", path, error, aside.name)
        with contextlib.suppress(OSError):
            path.replace(aside)
        return none


# ---- scores ----


def read_scores(run: Place) -> dict[str, dict[str, float]]:
    """{column: {name: value}} of a run's evals.json, empty before the first evaluation. One that
    cannot be read is put aside, and that is said."""

    def checked(columns: dict) -> dict[str, dict[str, float]]:
        return {name: {k: float(v) for k, v in of.items()} for name, of in columns.items()}

    return read_json(run / "evals.json", {}, checked)


def add_scores(run: Place, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Add numbers to evals.json, where others may write too; those of the same names are
    replaced."""
    known = read_scores(run)
    merged = known | {name: known.get(name, {}) | dict(of) for name, of in columns.items()}
    write_whole(run / "evals.json", json.dumps(merged, indent=1) + "\n")


class Handler(logging.Handler):
    """Warnings above the bar, each in one line, so that a path in it stays whole."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname} {record.getMessage()}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def not_ours(record: logging.LogRecord) -> bool:
    return record.name != log.name


class Log:
    """The log of a run: `write(step, values)` for numbers and pictures, and a progress bar."""

    def __init__(self, run: Place, steps: int, start: int = 0):
        self.speaks = jax.process_index() == 0
        self.run, self.steps = run, steps
        self.console = Console(file=lasting(sys.stderr), quiet=not self.speaks)
        self.handler = Handler(self.console)
        log.addHandler(self.handler)
        self.others = [h for h in logging.root.handlers if type(h) is logging.StreamHandler]
        self.others = self.others if self.speaks else []
        for handler in self.others:  # would say the same once more
            handler.addFilter(not_ours)
        columns = [TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(None)]
        columns += [TextColumn("{task.fields[text]}"), TimeRemainingColumn(compact=True)]
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("train", total=steps, completed=start, text="compiling")
        self.bar.start()
        self.board, self.failing = None, False
        self.growing: list[Growing] = []  # what `keep` writes
        self.writer, self.writing = ThreadPoolExecutor(1, "sslx-log"), Future()
        self.writing.set_result(None)
        self.kept = time.monotonic()
        if self.speaks:
            with contextlib.nullcontext() if self.remote else self.forgiving(start, "metrics"):
                self.truncate(start)
            self.rows = self.grow(run / "metrics.jsonl")

    @property
    def remote(self) -> bool:
        return isinstance(self.run, Remote)

    def truncate(self, start: int) -> None:
        """Remove the rows after the checkpoint that a run resumes from."""
        rows = [json.dumps(row) for row in step_rows(self.run) if row["step"] <= start]
        kept = [""]
        for row in rows:
            if self.remote and len(kept[-1]) > BLOCK:
                kept.append("")
            kept[-1] += row + "\n"
        old = list(blocks(self.run / "metrics.jsonl"))
        for n, text in enumerate(kept):
            write_whole(block(self.run / "metrics.jsonl", n), text)
        for path in old[len(kept) :]:
            path.unlink()

    def grow(self, path: Place) -> "Growing":
        """A file to add to, which `keep` writes."""
        self.growing.append(Growing(path))
        return self.growing[-1]

    def keep(self, step: int) -> None:
        """Write what a bucket lacks of the files that grow: before a checkpoint counts, so that
        they are complete up to it. On a disk nothing is left to write."""
        if self.remote:
            self.writing.result()
            self._keep(step)

    def _keep(self, step: int) -> None:
        with self.forgiving(step, "metrics", "not written yet"):
            for file in self.growing:
                file.store()
        self.kept = time.monotonic()

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Numbers to metrics.jsonl and TensorBoard, pictures to pictures/ and TensorBoard."""
        if not self.speaks:
            return
        numbers = {k: float(v) for k, v in values.items() if not isinstance(v, np.ndarray)}
        row = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        with self.forgiving(step, "metrics"):
            self.rows.write(json.dumps({"step": step, **row}).encode() + b"\n")
            self.board = self.board or Board(self.events(step), step)
            self.board.write(step, values)
        if pictures := values.keys() - numbers.keys():
            with self.forgiving(step, "pictures"):
                for name in pictures:
                    write_picture(self.run, f"{name}-{step:06d}", values[name])
        if self.remote and time.monotonic() - self.kept > EVERY and self.writing.done():
            self.writing = self.writer.submit(self._keep, step)

    def events(self, step: int):
        """A new file of TensorBoard's, which replaces from a step on what older ones say."""
        path = self.run / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"
        return self.grow(path) if self.remote else path.open("wb")

    @contextlib.contextmanager
    def forgiving(self, step: int, what: str, fate: str = "lost") -> Iterator[None]:
        """A context in which failed writes are logged once and do not stop the run."""
        try:
            yield
            self.failing = False
        except OSError as error:
            if not self.failing:
                text = "%s from step %d on are %s (%s); the run goes on"
                log.error(text, what, step, fate, error)
            self.failing = True
            if not self.remote:
                self.stop()  # half a record ends a TensorBoard file

    def progress(self, step: int, text: str = "", line: bool = False) -> None:
        """Move the bar; with `line`, a line of its own where there is no terminal for a bar."""
        self.bar.update(self.task, completed=step, **({"text": text} if text else {}))
        if line and text and not self.console.is_terminal:
            self.console.print(f"step {step}/{self.steps}  {text}", highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        log.warning("%s", text)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        log.removeHandler(self.handler)
        for handler in self.others:
            handler.removeFilter(not_ours)
        self.bar.stop()
        self.keep(self.steps)
        self.writer.shutdown()
        self.stop()

    def stop(self) -> None:
        """Close the TensorBoard file; the next write begins another."""
        if self.board:
            with contextlib.suppress(OSError):
                self.board.target.close()
        self.board = None


class Board:
    """A TensorBoard file; from its first step on it replaces what older ones in the run say.

    Written at once: TensorBoard's own writer has a thread, which a full disk kills, and then waits
    for it for ever.
    """

    def __init__(self, target, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.target, self.writer = target, RecordWriter
        self.event, self.summary, now = event_pb2.Event, summary_pb2.Summary, time.time()
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.add(
            self.event(wall_time=now, file_version="brain.Event:2"),
            self.event(wall_time=now, step=step, session_log=restart),
        )

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        Of, events = self.summary.Value, []
        for name, x in values.items():
            if isinstance(x, np.ndarray):
                shown = Of(tag=name, image=self.image(x))
            else:
                shown = Of(tag=name, simple_value=x)
            summary = self.summary(value=[shown])
            events.append(self.event(wall_time=time.time(), step=step, summary=summary))
        self.add(*events)

    def image(self, x: np.ndarray):
        height, width, channels = x.shape
        return self.summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png(x)
        )

    def add(self, *events) -> None:
        """Whole records, in one piece."""
        records = io.BytesIO()
        for event in events:
            self.writer(records).write(event.SerializeToString())
        self.target.write(records.getvalue())
        self.target.flush()


def block(path: Place, n: int) -> Place:
    """The n-th object of a file that grows in a bucket: the file's own name, then NAME.0001, ..."""
    return path.with_name(f"{path.name}.{n:04d}") if n else path


def blocks(path: Place) -> Iterator[Place]:
    """Those of them that are there."""
    return itertools.takewhile(lambda b: b.exists(), (block(path, n) for n in itertools.count()))


class Growing:
    """A file that grows. On a disk what is written is appended at once. An object in a bucket
    cannot grow, so `store` writes it anew, and begins another once it is large."""

    def __init__(self, path: Place):
        self.path, self.new = path, []
        self.n: int | None = None  # of the last object, and what is in it
        self.content = b""

    def write(self, data: bytes) -> None:
        """Add whole records."""
        if isinstance(self.path, Remote):
            self.new.append(data)
        else:
            append(self.path, data)

    def store(self) -> None:
        """Write what is new to the bucket; where that fails it stays, for the next time. Another
        thread may add to it meanwhile."""
        if not (count := len(self.new)):
            return
        if self.n is None:
            old = list(blocks(self.path))
            self.content = old[-1].read_bytes() if old else b""
            self.n = max(0, len(old) - 1)
        if len(self.content) > BLOCK:
            self.n, self.content = self.n + 1, b""
        content = self.content + b"".join(self.new[:count])
        block(self.path, self.n).write_bytes(content)
        self.content = content
        del self.new[:count]

    def flush(self) -> None:
        """Nothing, as `store` is what writes."""

    close = flush


def append(path: Place, data: bytes) -> None:
    """Append all of it or nothing."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
