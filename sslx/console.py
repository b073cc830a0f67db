"""Streams to a terminal, a pipe or a file that may be gone."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Lasting:
    """A text stream whose writes never fail: a closed terminal, a reader that has left or a full
    disk under a log is no reason to stop."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def lasting(stream: Any) -> Lasting | None:
    """The stream with writes that never fail; None where the process has none."""
    return None if stream is None else Lasting(stream)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """A context in which stdout and stderr last; what is still unwritten then is given up, or
    Python would say so at its exit and end with a status of its own."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream]
    with (
        contextlib.redirect_stdout(lasting(sys.stdout)),
        contextlib.redirect_stderr(lasting(sys.stderr)),
    ):
        try:
            yield
        finally:
            for stream in streams:
                try:
                    stream.flush()
                except OSError:
                    with open(os.devnull, "w") as nothing:
                        os.dup2(nothing.fileno(), stream.fileno())
