"""What ends a run between two steps, and what is no reason to end it."""

import os
import signal
import subprocess
import sys

import pytest
from commands import TINY, rows, start, stop

from sslx.checkpoint import Checkpoints
from sslx.console import Lasting
from sslx.signals import Signals

HELD_AFTER = 28  # batches: step 1 is logged, step 40 out of reach
ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def theirs():
    """Handlers of the program around, as a notebook has them."""
    before = {s: signal.getsignal(s) for s in ENDING}
    handlers = {s: lambda signum, frame: None for s in ENDING}
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    yield handlers
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", ENDING)
def test_a_signal_is_remembered_and_handlers_come_back(theirs, signum):
    with Signals() as signals:
        assert signals.received(1) == 0
        os.kill(os.getpid(), signum)
        assert signals.received(1) == signum
    assert {s: signal.getsignal(s) for s in ENDING} == theirs


def test_a_second_one_acts_at_once_if_both_end_a_run(theirs):
    with Signals() as signals:
        for signum in (signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert signals.received(1) == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_nohup_ignores_stays_ignored(theirs):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received(1) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_handler_that_python_did_not_set_stays(theirs, monkeypatch):
    get = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda s: None if s == signal.SIGUSR1 else get(s))
    with Signals():
        assert get(signal.SIGUSR1) is theirs[signal.SIGUSR1]


# ---- consoles that are gone ----


def test_a_run_goes_on_without_its_reader(tmp_path):
    run, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    process = start("train", TINY, "--workdir", run, HELD_AFTER=HELD_AFTER, HELD=hold)
    try:
        first = process.stdout.readline()
        assert first == "40 steps of 16 examples are 0.444 epochs of 1,440; from step 0.\n"
        assert process.stdout.readline().startswith("the step is compiled: ")
        assert process.stdout.readline().startswith("step 1/40")
        process.stdout.close()  # as `| head -n 3` does
        hold.unlink()
        assert process.wait(timeout=120) == 0
    finally:
        stop(process)
    assert Checkpoints(run / "checkpoints").steps() == [20, 40] and rows(run)[-1]["step"] == 40


@pytest.mark.parametrize("command", ["print('x' * 100_000)", "print('x')", "fail('x', 3)"])
def test_what_nobody_reads_is_no_error(command):
    code = "import sys\nfrom sslx.cli import fail, lasting_streams\n"
    code += f"with lasting_streams():\n    {command}\nsys.exit(3)"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=write, check=False)
    os.close(write)
    assert done.returncode == 3


def test_a_stream_that_fails_is_written_when_it_works_again():
    class Full:
        encoding, text = "utf-8", ""
        room = False

        def write(self, text):
            if not self.room:
                raise OSError(28, "No space left on device")
            self.text += text

    stream = Lasting(Full())
    assert stream.write("lost") == 4 and stream.encoding == "utf-8"
    stream.stream.room = True
    stream.write("kept")
    assert stream.text == "kept"
