"""Where the time of a run goes: a clock of one start, and an account of all starts.

The kinds of time have the names of ml-goodput-measurement. `step` is productive, all others are
not. What passes between the end of a process and the next start is not counted: it may be the
cluster's, or the user's.
"""

import contextlib
import datetime
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from sslx.log import EVERY, Log, read_json, write_whole

KINDS = (
    "initialization",
    "checkpoint_restore",
    "compile",
    "evaluation",
    "step",
    "data_loading",
    "checkpoint_save",
)
AGAIN = "wasted_progress"  # steps after the checkpoint that a run went back to
STEPS = {"step": "steps", AGAIN: "steps computed again"}  # in a sentence

# What jax reports of a compilation: Python is traced, lowered, and compiled or found in the cache.
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
STAGES = ("/jax/core/compile/jaxpr_trace_duration", LOWERED, COMPILED)
FOUND = "/jax/compilation_cache/cache_hits"


class Clock:
    """The seconds of this process by kind; each second is of one kind."""

    def __init__(self, began: float | None = None, tell: Callable[[str], None] = lambda what: None):
        """A clock that started at `began`, by time.perf_counter(), now by default; it calls `tell`
        with what is being done."""
        self.tell, self.devices = tell, 0.0
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.kind = "initialization"
        self.since = time.perf_counter() if began is None else began
        self.before = self.totals()

    def totals(self) -> dict[str, float]:
        """{kind: seconds} until now."""
        now = time.perf_counter()
        self.seconds[self.kind] += now - self.since
        self.since = now
        return dict(self.seconds)

    @contextlib.contextmanager
    def spending(self, kind: str, what: str = "") -> Iterator[None]:
        """A context whose time is of this kind, but for what contexts within it take; `what` says
        more of it."""
        if what:
            self.tell(what)
        self.totals()
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.totals()
            self.kind = before

    def move(self, seconds: float, kind: str) -> None:
        """Count the last so many seconds as of another kind."""
        self.seconds[self.kind] -= seconds
        self.seconds[kind] += seconds

    def wait(self, iterator, what: str = ""):
        """The iterator's next element; the time it takes is data loading."""
        with self.spending("data_loading", what):
            return next(iterator)

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """A context that waits for the devices."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.devices += time.perf_counter() - begin

    def spent(self) -> tuple[float, float, float]:
        """Seconds since the last reading: in all, waiting for data, waiting for devices."""
        now, before = self.totals(), self.before
        loading = now["data_loading"] - before["data_loading"]
        return sum(now.values()) - sum(before.values()), loading, self.devices

    def rates(self, steps: int) -> tuple[float, float]:
        """(steps a second, share of time waited for data) since the last reading."""
        elapsed, loading, _ = self.spent()
        return steps / max(elapsed, 1e-9), loading / max(elapsed, 1e-9)

    def read(self, steps: int) -> tuple[float, float]:
        """The rates since the last reading; the next ones begin anew."""
        rates = self.rates(steps)
        self.before, self.devices = self.totals(), 0.0
        return rates


class Compilations:
    """A context in which a clock counts what jax compiles as such, whatever for; says how long the
    step took and whether it was in the cache, and warns where the step is compiled again."""

    def __init__(self, log: Log, clock: Clock, name: str = "train_step"):
        self.log, self.clock, self.name = log, clock, name
        self.thread, self.cached = threading.get_ident(), False
        self.seconds, self.count = Counter(), Counter()

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_listener(self.event)
        jax.monitoring.register_event_duration_secs_listener(self.duration)
        return self

    def __exit__(self, *exception) -> None:
        jax.monitoring.unregister_event_listener(self.event)
        jax.monitoring.unregister_event_duration_listener(self.duration)

    def event(self, event: str, **_) -> None:
        if event == FOUND and threading.get_ident() == self.thread:
            self.cached = True

    def duration(self, event: str, seconds: float, *, fun_name: str = "", **_) -> None:
        if event not in STAGES or threading.get_ident() != self.thread:
            return
        self.clock.move(seconds, "compile")
        name = fun_name.removeprefix("jit(").removesuffix(")")
        self.seconds[name] += seconds
        if event == COMPILED:
            self.count[name] += 1
            cached, self.cached, seconds = self.cached, False, self.seconds.pop(name)
            if name == self.name:
                self.say(seconds, cached)

    def say(self, seconds: float, cached: bool) -> None:
        where = f", from the cache in {jax.config.jax_compilation_cache_dir}" if cached else ""
        if self.count[self.name] == 1:
            return self.log.say(f"the step is compiled: {seconds:.1f} s{where}")
        self.log.warn(
            f"the step was compiled again, {seconds:.1f} s{where}: the shapes or shardings of its "
            "state changed, which the objective's update or its buffers may have done"
        )


class Account:
    """What all starts of a run spent their time on, in goodput.json, which process 0 writes with
    every row of metrics, in a bucket once a minute, so that a process that is killed is counted up
    to there."""

    def __init__(self, log: Log, clock: Clock, start: int):
        path = log.run / "goodput.json"
        self.log, self.clock, self.path, self.first, self.step = log, clock, path, start, start
        self.due = 0.0  # by time.monotonic(), when the next writing may be
        self.began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.earlier = read_json(path, [], checked) if log.speaks else []

    def starts(self) -> list[dict[str, Any]]:
        """Each start of the run, this one last: when, from and to which step, seconds by kind."""
        seconds = {kind: round(x, 3) for kind, x in self.clock.totals().items()}
        own = {"began": self.began, "from": self.first, "step": self.step, "seconds": seconds}
        return [*self.earlier, own]

    def seconds(self) -> dict[str, float]:
        """{kind: seconds} of all starts together."""
        return {kind: round(x, 3) for kind, x in summed(self.starts()).items()}

    def write(self) -> OSError | None:
        """Write all until now; returns the error of a failure, which the next writing makes up."""
        if self.log.speaks and time.monotonic() >= self.due:
            if self.log.remote:  # a bucket takes long, and each writing costs
                self.due = time.monotonic() + EVERY
            try:
                write_whole(self.path, json.dumps(self.starts(), indent=1) + "\n")
            except OSError as error:
                return error
        return None

    def close(self) -> None:
        """Write the account, and say the shares of this start and of all."""
        self.due = 0.0
        if error := self.write():
            self.log.warn(f"where the time went is not written ({error})")
        text = f"time: {shares(self.clock.totals())}"
        if self.earlier:
            text += f"; over {len(self.earlier) + 1} starts: {shares(self.seconds())}"
        self.log.say(text)


def checked(starts: list) -> list[dict[str, Any]]:
    """The starts of a goodput.json; raises what a value that is missing or no number does."""
    for start in starts:
        _ = sum(start["seconds"][kind] for kind in KINDS), start["from"] + start["step"] + 0
    return starts


def summed(starts: list[Mapping[str, Any]]) -> dict[str, float]:
    """{kind: seconds} of several starts. The steps that a later start went back before count as
    computed again, with the mean time of a step of theirs."""
    total, goes_back = dict.fromkeys((*KINDS, AGAIN), 0.0), math.inf
    for start in reversed(starts):
        first, last = start["from"], start["step"]
        again = max(last - max(goes_back, first), 0) / max(last - first, 1)
        for kind in KINDS:
            total[kind] += start["seconds"][kind]
        total["step"] -= again * start["seconds"]["step"]
        total[AGAIN] += again * start["seconds"]["step"]
        goes_back = min(goes_back, first)
    return total


def shares(seconds: Mapping[str, float]) -> str:
    """As `1:02:03, 91% steps, 6% compile, 2% evaluation`: the largest first, what is under a
    half of a percent left out."""
    whole = max(sum(seconds.values()), 1e-9)
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    parts = [
        f"{x / whole:.0%} {STEPS.get(kind, kind.replace('_', ' '))}"
        for kind, x in ranked
        if x >= whole / 200
    ]
    return ", ".join([str(datetime.timedelta(seconds=round(whole))), *parts])
