"""Processes of a run meet before they join jax, so that those that do not come are named.

jax itself waits without a word, and then ends every process without saying for whom it waited.
Process 0 listens on the port that jax's service takes over a moment later; the others connect,
say who they are, and wait for one line: that all have come, or who has not.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import time

from sslx.exits import Lost

AGAIN = 1.0  # seconds between two attempts to connect
SAID = 30.0  # seconds until process 0 says for whom it waits; then twice as long, and so on


def meet(address: str, count: int, index: int, timeout: int, hint: str = "") -> None:
    """Return when all `count` processes of a run are up; this is the one numbered `index`.

    Raises Lost, with `hint`, in every process that is up, naming those that did not come within
    `timeout` seconds; ValueError in a process that expects another number of them than process 0.
    """
    end = time.monotonic() + timeout
    missing = _guest(address, count, index, end) if index else _host(address, count, end)
    if missing:
        raise Lost(f"{missing} did not come within {timeout:,.0f} s{hint}")


def _host(address: str, count: int, end: float) -> str:
    """Who did not come, in words, as the others are told; empty if all are here."""
    say, pause = time.monotonic() + SAID, SAID
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listening(address))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(server, selectors.EVENT_READ)
        came: dict[int, socket.socket] = {}
        while (missing := sorted({*range(1, count)} - {*came})) and time.monotonic() < end:
            if time.monotonic() > say:
                print(f"sslx: waiting for {_listed(missing, count)}", file=sys.stderr, flush=True)
                say, pause = time.monotonic() + 2 * pause, 2 * pause
            for key, _ in selector.select(1.0):
                if key.fileobj is server:
                    guest = stack.enter_context(server.accept()[0])
                    selector.register(guest, selectors.EVENT_READ)
                    continue
                guest = key.fileobj
                said = _received(guest)
                number = said.get("index")
                came = {i: known for i, known in came.items() if known is not guest}  # it left
                if said.get("count") == count and number in range(1, count):
                    came[number] = guest  # in place of an earlier one that was started again
                    continue
                if number is not None:
                    _tell(guest, {"wrong": f"process 0 expects {count} processes"})
                selector.unregister(guest)
                guest.close()
        answer = _listed(missing, count) if missing else ""
        for guest in came.values():
            _tell(guest, {"missing": answer})
        for guest in came.values():  # that they close first leaves the port free for jax
            with contextlib.suppress(OSError):
                guest.recv(1)
        return answer


def _guest(address: str, count: int, index: int, end: float) -> str:
    """Who did not come, as process 0 says."""
    host, port = address.rsplit(":", 1)
    say, pause = time.monotonic() + SAID, SAID
    while (left := end + 10 - time.monotonic()) > 0:  # process 0 may have begun a little later
        with contextlib.suppress(OSError):  # it is not up, or went down again
            with socket.create_connection((host.strip("[]"), int(port)), 10) as server:
                _tell(server, {"index": index, "count": count})
                answer = _received(server, left)
            if wrong := answer.get("wrong"):
                raise ValueError(f"{wrong}, but process {index} expects {count}.")
            if "missing" in answer:
                return answer["missing"]
        if time.monotonic() > say:
            print(f"sslx: waiting for process 0 at {address}", file=sys.stderr, flush=True)
            say, pause = time.monotonic() + 2 * pause, 2 * pause
        time.sleep(AGAIN)
    return f"process 0 at {address}"


def _listening(address: str) -> socket.socket:
    """A socket where jax's service will be."""
    where = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
    host, port = (where or address).rsplit(":", 1)
    host = host.strip("[]") if where else ""
    every = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if every or ":" in host else socket.AF_INET
    return socket.create_server(
        (host, int(port)), family=family, backlog=4096, dualstack_ipv6=every
    )


def _tell(other: socket.socket, what: dict) -> None:
    with contextlib.suppress(OSError):
        other.settimeout(5)
        other.sendall(json.dumps(what).encode() + b"\n")


def _received(other: socket.socket, timeout: float = 5) -> dict:
    """What `_tell` sent; empty for a connection that ended, and for anything else."""
    try:
        other.settimeout(timeout)
        what = json.loads(other.makefile().readline(1024))
        return what if isinstance(what, dict) else {}
    except (OSError, ValueError):
        return {}


def _listed(numbers: list[int], count: int) -> str:
    """Numbers of processes in words, the first few of many."""
    some = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"{len(numbers)} of {count} processes ({some})"
