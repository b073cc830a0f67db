"""The processes of a run watch each other, so that one that is lost or stuck is named.

A thread of each, which no collective holds up, writes what its process is doing into the key-value
store of jax's coordination service. Process 0 reads that, says for whom the others wait, and ends
them all where nothing goes on: a cluster starts them again. Nothing of it is on the path of a step.
"""

import atexit
import collections
import contextlib
import faulthandler
import itertools
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax

from sslx.exits import LOST, Lost, code_of
from sslx.paths import Place
from sslx.processes import agreed, store

BEAT = 2.0  # seconds between two signs of life
SILENT = 80.0  # seconds without one until a process counts as lost; jax would end all after 100
READ = 5 * BEAT  # process 0, where the store is, stays so long after a verdict
FAILING = 5 * BEAT  # the same, once another process failed: the likely reason is that it is gone
SLOW = ("compiling", "restoring")  # phases that begin so may take SLOWER times as long
SLOWER = 4
PAUSE = 60.0  # seconds without progress until process 0 says who is where; then twice as long, ...

log = logging.getLogger("sslx")
_gangs = itertools.count()  # several runs of a program, one after another


@dataclass(frozen=True)
class Window:
    """Where a process's time went since the row of metrics before `step`, in seconds.

    data     waited for batches
    devices  waited for the devices, and so for the slowest process
    """

    step: int = 0
    seconds: float = 0.0
    data: float = 0.0
    devices: float = 0.0


@dataclass(frozen=True)
class Peer:
    """What a process says of itself.

    heard  when process 0, by its own clock, last read a new sign of life of it
    moved  when process 0 last saw it in a new phase
    phase  what it does now, such as "step 120"; `phases` counts them
    beat   counts its signs of life
    ended  why and with which exit code, or None
    """

    index: int
    host: str
    phase: str
    phases: int = 0
    beat: int = 0
    ended: tuple[str, int] | None = None
    window: Window = Window()
    heard: float = 0.0
    moved: float = 0.0

    def __str__(self) -> str:
        return f"process {self.index} ({self.host})"


@dataclass(frozen=True)
class Verdict:
    """Why all processes end, and with which exit code; `about` are those that are the reason,
    and end by an error of their own."""

    text: str
    code: int
    about: tuple[int, ...] = ()


# ---- what process 0 concludes ----


def verdict(peers: Sequence[Peer], now: float, stuck_after: float) -> Verdict | None:
    """Why the run cannot go on; None while it can."""
    alive = [peer for peer in peers if peer.ended is None]
    failed = [peer for peer in peers if peer.ended and 0 < peer.ended[1] < 128]  # by no signal
    if not alive:
        return Verdict("all have ended", 0, tuple(peer.index for peer in peers))
    patience = min(FAILING if failed else SILENT, stuck_after)
    if lost := [peer for peer in alive if now - peer.heard > patience]:
        text = f"{listed(lost)} gave no sign of life for {now - lost[0].heard:.0f} s; last in: "
        text += ", ".join(dict.fromkeys(peer.phase for peer in lost))
        return Verdict(text, LOST, tuple(peer.index for peer in lost))
    still = min((now - peer.moved for peer in peers), default=0.0)
    if failed and still > min(SILENT, stuck_after):
        text, code = failed[0].ended
        about = tuple(peer.index for peer in failed)
        return Verdict(f"{listed(failed)} ended: {text}", code, about)
    if any(peer.phase.startswith(SLOW) for peer in alive):
        stuck_after *= SLOWER
    if still > stuck_after:
        text = f"{still:.0f} s without progress; {where(alive)}"
        return Verdict(text, LOST, tuple(peer.index for peer in alive))
    return None


def where(peers: Sequence[Peer]) -> str:
    """Who is in which phase, the fewest first: for them the others wait."""
    phases = collections.defaultdict(list)
    for peer in peers:
        phases[peer.phase].append(peer)
    fewest = sorted(phases.items(), key=lambda item: len(item[1]))
    return "; ".join(f"{listed(of)} in: {phase}" for phase, of in fewest)


def listed(peers: Sequence[Peer]) -> str:
    """Processes by number and host, or how many of them if they are many."""
    return ", ".join(map(str, peers)) if len(peers) <= 4 else f"{len(peers):,} processes"


def slowest(peers: Sequence[Peer]) -> tuple[Peer, float, float] | None:
    """The process for which the others waited, and the shares of time that it and the median one
    did not wait for devices; None where none stands out by a tenth."""
    measured = [peer for peer in peers if peer.window.seconds]
    busy = sorted((1 - p.window.devices / p.window.seconds, p.index) for p in measured)
    if len(busy) < 2:
        return None
    (most, index), (median, _) = busy[-1], busy[(len(busy) - 1) // 2]
    if most - median < 0.1:
        return None
    return next(p for p in measured if p.index == index), most, median


# ---- the watch ----


class Gang:
    """This process among those of a run, from `with` to its end.

    stuck_after  seconds without progress of any process, after which all write the stacks of their
                 threads to RUN/stacks and exit with 42; four times as many while the step is
                 compiled or a checkpoint restored. One process alone does not exit, it says so

    Where process 0 is killed, and with it jax's service, jax aborts the others at once, with 134.
    """

    def __init__(self, run: Place, stuck_after: float):
        self.run, self.stuck_after = run, stuck_after
        self.index, self.count = jax.process_index(), jax.process_count()
        self.store = store(f"sslx/gang/{next(_gangs)}")
        self.host, self.beat = socket.gethostname(), 0
        self.phase, self.window, self.ended = ("start", 0), Window(), None
        now = time.monotonic()
        self.peers = {
            i: Peer(i, "unknown host", "joining", heard=now, moved=now) for i in range(self.count)
        }
        self.closing, self.given = threading.Event(), threading.Event()
        self.verdict: Verdict | None = None
        self.said, self.named = PAUSE, -1
        self.thread = threading.Thread(target=self._watch, name="sslx-gang", daemon=True)

    def __enter__(self) -> "Gang":
        self.thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Part from the others; raises Lost where `error` came of another process's end."""
        try:
            if self.count > 1:
                self._part(error)
        finally:
            self.closing.set()
            self.thread.join(2 * BEAT)

    def doing(self, phase: str) -> None:
        """Say what this process does from now on; costs nothing."""
        self.phase = phase, self.phase[1] + 1

    def measured(self, window: Window) -> None:
        """Say where this process's time went."""
        self.window = window

    def together(self, name: str) -> None:
        """Wait until every process of the run is here."""
        self.doing(f"waiting for all at {name}")
        agreed(True)

    def straggler(self) -> dict[str, float]:
        """Metrics of the process for which the others wait, which is said once; empty for none, and
        on CPUs, where a step is computed by the process itself."""
        if jax.default_backend() == "cpu" or not (found := slowest(list(self.peers.values()))):
            return {}
        peer, busy, median = found
        if peer.index != self.named:
            log.warning(
                "step %d: all wait for %s: it had no work for its devices in %.0f %% of the time, "
                "of which it waited %.0f %% for data; the median process %.0f %%",
                *(peer.window.step, peer, 100 * busy),
                *(100 * peer.window.data / peer.window.seconds, 100 * median),
            )
            self.named = peer.index
        return {"slowest_process": peer.index, "slowest_busy": busy, "median_busy": median}

    # ---- its thread ----

    def _watch(self) -> None:
        while True:
            try:
                self._beat()
            except Exception as error:  # with process 0 its store is gone: jax ends this process
                log.debug("the store of the run's processes: %s", error)
            if self.closing.wait(BEAT / 4 if self.ended else BEAT):
                return

    def _beat(self) -> None:
        self.beat += 1
        self._tell()
        for given in self.store.under("verdict"):
            return self._act(Verdict(given["text"], given["code"], tuple(given["about"])))
        if self.index == 0:
            self._look(time.monotonic())

    def _tell(self) -> None:
        """Write down what this process does."""
        mine = {"beat": self.beat, "ended": self.ended, "window": vars(self.window)}
        phase, phases = self.phase
        mine |= {"index": self.index, "host": self.host, "phase": phase, "phases": phases}
        self.store.put(f"peers/{self.index}", mine)

    def _look(self, now: float) -> None:
        """Read what all say, say who is late, and give a verdict where nothing goes on."""
        for new in map(peer_of, self.store.under("peers")):
            old = self.peers[new.index]
            heard = old.heard if new.beat == old.beat else now
            moved = old.moved if (new.phases, new.ended) == (old.phases, old.ended) else now
            self.peers[new.index] = replace(new, heard=heard, moved=moved)
        peers = list(self.peers.values())
        still = min(now - peer.moved for peer in peers)
        self.said = PAUSE if still < PAUSE else self.said
        if still >= self.said:
            log.warning("%.0f s without progress; %s", still, where(peers))
            self.said = 2 * self.said
            if self.count == 1 and still >= self.stuck_after:
                self._write_stacks()
        if self.count > 1 and (given := verdict(peers, now, self.stuck_after)):
            self.store.put("verdict/0", vars(given))
            self._act(given)

    def _act(self, given: Verdict) -> None:
        """End this process as the verdict says, or leave it to the error that ends it already."""
        self.verdict = given
        self.given.set()
        if self.ended:
            return
        print(f"sslx: {given.text}", file=sys.stderr)
        self._write_stacks()
        if self.index == 0:
            time.sleep(READ)
        leave(given.code)

    def _write_stacks(self) -> None:
        """Write the stacks of all threads to RUN/stacks, or, if that does not work, to stderr."""

        def write() -> None:
            path = self.run / "stacks" / f"{self.index}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
            done.set()

        done = threading.Event()
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            text = file.read()
        with contextlib.suppress(Exception):  # a disk may be what all wait for
            writing = threading.Thread(target=write, daemon=True)
            writing.start()
            writing.join(2 * BEAT)
        if not done.is_set():
            print(text, file=sys.stderr)

    # ---- its end ----

    def _part(self, error: BaseException | None) -> None:
        """Tell the others why this process ends. After an error wait until all of them have ended
        too, or process 0 has said why they cannot."""
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        self.ended = ("", 0) if error is None else (text, code_of(error))
        with contextlib.suppress(Exception):
            self._tell()
        if not isinstance(error, Exception):
            return
        self.given.wait(3 * min(SILENT, self.stuck_after))
        about = self.verdict.about if self.verdict else ()
        if len(about) == self.count:
            return  # jax waits for all at exit
        mine = not self.verdict or self.index in about
        code = code_of(error) if mine else self.verdict.code
        if self.index == 0:
            time.sleep(READ)
        atexit.register(leave, code)  # jax would wait for processes that do not come
        if not mine:
            raise Lost(self.verdict.text, code) from error


def peer_of(told: Mapping) -> Peer:
    """What `Gang._tell` wrote down."""
    ended = told["ended"] and tuple(told["ended"])
    return Peer(**{**told, "ended": ended, "window": Window(**told["window"])})


def leave(code: int) -> None:
    """End this process now, without what is done at exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
