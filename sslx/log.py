"""Logging of a run: progress bar, metrics.jsonl, TensorBoard, pictures; by process 0 only."""

import contextlib
import errno
import io
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sslx.console import lasting

Read = TypeVar("Read")
Value = float | np.ndarray  # a number, or a uint8 picture [H, W, C]

log = logging.getLogger("sslx")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write the whole file or none of it: a kill, a full disk or a lost machine leaves what was
    there."""
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        return
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a rename may outlive a power cut, and the bytes not
        new.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write names no file


def write_picture(run: Path, name: str, image: np.ndarray) -> None:
    """Write a uint8 picture [H, W, C] to pictures/NAME.png of a run."""
    path = run / "pictures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(image).save(path)


def picture(image: np.ndarray) -> Image.Image:
    """A uint8 array [H, W, 1 or 3] as a Pillow picture."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def step_rows(run: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; says how many lines are none, cut by a kill or odd."""
    path, odd = run / "metrics.jsonl", 0
    text = path.read_text(errors="replace") if path.exists() else ""
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


def read_json(path: Path, none: Read, checked: Callable[[Any], Read] = lambda x: x) -> Read:
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
        aside = path.with_suffix(".damaged.json")
        log.warning("%s is damaged (%s): put aside as %s", path, error, aside.name)
        with contextlib.suppress(OSError):
            path.replace(aside)
        return none


# ---- scores ----


def read_scores(run: Path) -> dict[str, dict[str, float]]:
    """{column: {name: value}} of a run's evals.json, empty before the first evaluation. One that
    cannot be read is put aside, and that is said."""

    def checked(columns: dict) -> dict[str, dict[str, float]]:
        return {name: {k: float(v) for k, v in of.items()} for name, of in columns.items()}

    return read_json(run / "evals.json", {}, checked)


def add_scores(run: Path, columns: Mapping[str, Mapping[str, float]]) -> None:
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

    def __init__(self, run: Path, steps: int, start: int = 0):
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
        if self.speaks:
            with self.forgiving(start, "metrics"):
                self.truncate(start)

    def truncate(self, start: int) -> None:
        """Remove the rows after the checkpoint that a run resumes from."""
        path = self.run / "metrics.jsonl"
        rows = [row for row in step_rows(self.run) if row["step"] <= start]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Numbers to metrics.jsonl and TensorBoard, pictures to pictures/ and TensorBoard."""
        if not self.speaks:
            return
        numbers = {k: float(v) for k, v in values.items() if not isinstance(v, np.ndarray)}
        row = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        with self.forgiving(step, "metrics"):
            append(self.run / "metrics.jsonl", json.dumps({"step": step, **row}) + "\n")
            for name in values.keys() - numbers.keys():
                write_picture(self.run, f"{name}-{step:06d}", values[name])
            self.board = self.board or Board(self.run, step)
            self.board.write(step, values)

    @contextlib.contextmanager
    def forgiving(self, step: int, what: str) -> Iterator[None]:
        """A context in which failed writes are logged once and do not stop the run."""
        try:
            yield
            self.failing = False
        except OSError as error:
            if not self.failing:
                log.error("%s from step %d on are lost (%s); the run goes on", what, step, error)
            self.failing = True
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
        self.stop()

    def stop(self) -> None:
        """Close the TensorBoard file; the next write begins another."""
        if self.board:
            with contextlib.suppress(OSError):
                self.board.file.close()
        self.board = None


class Board:
    """A TensorBoard file; from its first step on it replaces what older ones in the run say.

    Written at once: TensorBoard's own writer has a thread, which a full disk kills, and then waits
    for it for ever.
    """

    def __init__(self, run: Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary, now = event_pb2.Event, summary_pb2.Summary, time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{step}"
        self.file = RecordWriter((run / name).open("wb"))
        self.add(self.event(wall_time=now, file_version="brain.Event:2"))
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.add(self.event(wall_time=now, step=step, session_log=restart))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        Of = self.summary.Value
        for name, x in values.items():
            if isinstance(x, np.ndarray):
                shown = Of(tag=name, image=self.image(x))
            else:
                shown = Of(tag=name, simple_value=x)
            summary = self.summary(value=[shown])
            self.add(self.event(wall_time=time.time(), step=step, summary=summary))
        self.file.flush()

    def image(self, x: np.ndarray):
        height, width, channels = x.shape
        png = io.BytesIO()
        picture(x).save(png, "PNG")
        return self.summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
        )

    def add(self, event) -> None:
        self.file.write(event.SerializeToString())


def append(path: Path, row: str) -> None:
    """Append a whole line or nothing."""
    with path.open("ab", buffering=0) as file:
        size, data = file.tell(), row.encode()
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
