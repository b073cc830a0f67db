"""What is concluded of what the processes of a run say, and how they meet before that."""

import socket
import threading
from urllib.error import HTTPError

import jax
import numpy as np
import pytest
from commands import free_port

from sslx import gang, processes, rendezvous
from sslx.exits import Lost, code_of
from sslx.gang import Peer, Window, slowest, verdict, where
from sslx.processes import Attempts, Failed, Own


def peer(index, phase="step 7", heard=100, moved=100, **more):
    return Peer(index, f"host{index}", phase, heard=float(heard), moved=float(moved), **more)


def test_a_run_that_goes_on_gets_no_verdict():
    assert verdict([peer(0), peer(1)], 150.0, 60.0) is None
    assert verdict([peer(0, moved=60.0), peer(1)], 150.0, 60.0) is None  # one goes on


def test_the_silent_are_lost():
    peers = [peer(0, heard=190.0), peer(1, "saving step 7", heard=100), peer(2, heard=190.0)]
    given = verdict(peers, 100 + gang.SILENT + 1, 1800.0)
    assert (given.code, given.about) == (42, (1,))
    assert given.text == "process 1 (host1) gave no sign of life for 81 s; last in: saving step 7"
    assert verdict(peers, 100 + gang.SILENT - 1, 1800.0) is None


def test_where_one_failed_the_silent_are_lost_soon():
    failed = peer(0, ended=("ValueError: Gloo", 2))
    given = verdict([failed, peer(1), peer(2, heard=112.0)], 112.0, 1800.0)
    assert (given.code, given.about) == (42, (1,))


def test_who_ended_by_an_error_ends_all_with_its_code():
    peers = [peer(0, heard=190.0), peer(1, ended=("DataError: no file", 2)), peer(2, heard=190.0)]
    assert verdict(peers, 100 + gang.SILENT - 1, 1800.0) is None  # they may end by themselves
    given = verdict(peers, 100 + gang.SILENT + 1, 1800.0)
    assert given.text == "process 1 (host1) ended: DataError: no file"
    assert (given.code, given.about) == (2, (1,))
    peers[1] = peer(1, ended=("Interrupted: SIGTERM", 143))  # others may still be saving
    assert verdict(peers, 100 + gang.SILENT + 1, 1800.0) is None
    everyone = [peer(i, ended=("x", 1)) for i in range(3)]
    assert verdict(everyone, 101.0, 1800.0).about == (0, 1, 2)


def test_where_nothing_goes_on_the_fewest_are_named_first():
    peers = [peer(i, heard=1000.0) for i in range(8)]
    peers[3] = peer(3, "waiting for data of step 7", heard=1000.0)
    given = verdict(peers, 1001.0, 900.0)
    assert given.code == 42 and "901 s without progress" in given.text
    assert where(peers) == (
        "process 3 (host3) in: waiting for data of step 7; 7 processes in: step 7"
    )


def test_the_slowest_is_who_waits_least_for_devices():
    windows = [Window(5, 10.0, 0.1, 9.5), Window(5, 10.0, 4.0, 5.0), Window(5, 10.0, 0.1, 9.4)]
    peers = [peer(i, window=window) for i, window in enumerate(windows)]
    found, busy, median = slowest(peers)
    assert found.index == 1
    assert busy == pytest.approx(0.5) and median == pytest.approx(0.06)
    assert slowest([peers[0], peers[2]]) is None and slowest(peers[:1]) is None


def test_an_attempt_fails_in_all_where_it_fails_in_one(monkeypatch):
    shared = Own()
    both = [Attempts(), Attempts()]
    for i, one in enumerate(both):
        one.store, one.index, one.count = shared, i, 2
        one.begin()
    waiting = threading.Thread(target=both[1].meet, args=("written", 60.0))
    waiting.start()
    both[0].meet("written", 60.0)
    waiting.join()
    both[1].fail("no room")
    with pytest.raises(Failed, match="process 1: no room"):
        both[0].meet("seen", 60.0)
    with pytest.raises(TimeoutError, match="process 1 did not come"):
        for one in both:
            one.begin()
        both[0].meet("written", 0.1)


def test_what_process_0_refuses_ends_all_with_its_code(monkeypatch):
    monkeypatch.setattr(processes, "of_first", lambda x: np.asarray(2))  # of a ConfigError there
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(Failed, match="process 0 could not go on") as raised:
        processes.by_first(lambda: 1 / 0)
    assert code_of(raised.value) == 2


def test_a_code_of_another_protocol_is_no_exit_code():
    assert code_of(HTTPError("http://x", 404, "no such object", {}, None)) == 1
    assert code_of(Lost("process 3 is gone")) == 42 and code_of(ValueError("x")) == 2


def test_a_slow_compilation_is_not_stuck():
    peers = [peer(i, "compiling the step", heard=1000) for i in range(2)]
    assert verdict(peers, 1001.0, 900.0) is None
    assert verdict(peers, 100 + 4 * 900.0 + 1, 900.0).code == 42


# ---- meeting ----


def meet(count, index, port, seconds=3, raised=None):
    try:
        rendezvous.meet(f"127.0.0.1:{port}", count, index, seconds, "; is there such a slice?")
    except Exception as error:
        raised[index] = error


def met(count, *arguments):
    """{process: error} of processes in threads that want to meet."""
    raised = {}
    threads = [
        threading.Thread(target=meet, args=(*a,), kwargs={"raised": raised}) for a in arguments
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def test_processes_meet_in_any_order_and_the_port_is_free_again(monkeypatch):
    monkeypatch.setattr(rendezvous, "AGAIN", 0.05)
    port = free_port()
    assert met(3, (3, 2, port, 30), (3, 1, port, 30), (3, 0, port, 30)) == {}
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_who_does_not_come_is_named_by_all(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "AGAIN", 0.05)
    monkeypatch.setattr(rendezvous, "SAID", 0.5)
    port = free_port()
    raised = met(4, (4, 0, port, 3), (4, 1, port, 3), (5, 4, port, 3))
    text = "2 of 4 processes (2, 3) did not come within 3 s; is there such a slice?"
    assert [str(raised[i]) for i in (0, 1)] == [text, text]
    assert isinstance(raised[0], Lost) and raised[0].code == 42
    assert str(raised[4]) == "process 0 expects 4 processes, but process 4 expects 5."
    assert "sslx: waiting for 2 of 4 processes (2, 3)" in capfd.readouterr().err
