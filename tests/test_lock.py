"""One writer for each run directory, on one host and over several; what is left of the dead."""

import json
import os
import threading
import time

import pytest
from commands import TINY, start, stop, until

from sslx import lock
from sslx.config import ConfigError
from sslx.lock import writing


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)


def owner(run):
    return (run / ".lock").read_text()


def test_a_second_writer_is_refused_within_a_second_and_may_force(tmp_path):
    run = tmp_path / "run"
    with writing(run):
        begun = time.monotonic()
        with pytest.raises(
            ConfigError, match=rf"is written to by process {os.getpid()} on .*--for"
        ):
            writing(run).__enter__()
        assert time.monotonic() - begun < 1
        with writing(run, force=True):
            assert json.loads(owner(run))["pid"] == os.getpid()
    refused = pytest.raises(ConfigError, match="is written to")
    with writing(run, force=True), refused:  # again, as in a notebook; what was forced locks too
        writing(run).__enter__()
    with pytest.raises(KeyError), writing(run):
        raise KeyError
    assert owner(run) == ""


def test_a_killed_writer_leaves_no_trap(tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom sslx.lock import writing\n"
    code += "with writing(Path(sys.argv[1])):\n    time.sleep(99)"
    process = start(tmp_path, code=code)
    try:
        until(lambda: (tmp_path / ".lock").exists() and owner(tmp_path), process)
        with pytest.raises(ConfigError, match=f"process {process.pid} on "):
            writing(tmp_path).__enter__()
    finally:
        stop(process)  # by SIGKILL
    assert str(process.pid) in owner(tmp_path)
    begun = time.monotonic()
    with writing(tmp_path):
        assert time.monotonic() - begun < 1


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("disk", ["keeps locks to a host", "has none"])
def test_a_writer_on_another_host(tmp_path, quick, monkeypatch, caplog, disk, alive):
    """Of which the kernel here knows nothing."""
    theirs = {"host": "elsewhere", "pid": 7, "since": "2026-01-01 00:00:00"}
    path, ended = tmp_path / ".lock", threading.Event()
    path.write_text(json.dumps(theirs))

    def beat():
        while not ended.wait(0.05):
            os.utime(path)

    if disk == "has none":

        def refuse(fd, how):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    thread = threading.Thread(target=beat)
    if alive:
        thread.start()
    try:
        if alive:
            with pytest.raises(ConfigError, match="process 7 on elsewhere, since 2026-01-01"):
                writing(tmp_path).__enter__()
            assert json.loads(owner(tmp_path)) == theirs
        else:
            with writing(tmp_path):
                assert json.loads(owner(tmp_path))["pid"] == os.getpid()
        assert "whether process 7 on elsewhere" in caplog.text
    finally:
        ended.set()
        if alive:
            thread.join()


def test_a_living_writer_touches_the_file(tmp_path, quick):
    with writing(tmp_path):
        before = (tmp_path / ".lock").stat().st_mtime_ns
        until(lambda: (tmp_path / ".lock").stat().st_mtime_ns > before, seconds=5)


@pytest.mark.parametrize("text", ["[]", "{", "3", "{}", "\x00\x00"])
def test_a_damaged_file_is_no_writer(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with writing(tmp_path):
        pass


def test_a_command_that_finds_a_writer_says_so(tmp_path, capfd, monkeypatch):
    from sslx import run
    from sslx.cli import main

    with writing(tmp_path / "run"):
        assert main(["train", str(TINY), "--workdir", str(tmp_path / "run")]) == 2
        assert "is written to by process" in capfd.readouterr().err
        assert not (tmp_path / "run" / "recipe.py").exists()
        monkeypatch.setattr(run, "check", lambda config: 1 / 0)  # nothing is opened before
        assert main(["train", str(TINY), "--workdir", str(tmp_path / "run")]) == 2
        assert "is written to by process" in capfd.readouterr().err
    monkeypatch.undo()
    assert main(["train", str(TINY), "--workdir", str(tmp_path / "[x]")]) == 2
    assert (
        "has '[' in it, which orbax" in capfd.readouterr().err and not (tmp_path / "[x]").exists()
    )
