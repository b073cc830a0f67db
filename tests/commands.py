"""The command line in processes of its own, each the leader of its group as in a terminal."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
TINY = REPO / "tests" / "tiny.py"
SSLX = "import sys; from sslx.cli import main; sys.exit(main(sys.argv[1:]))"


PATIENCE = 240  # seconds, for a hang


def start(*args, devices=1, code=SSLX, **env) -> subprocess.Popen:
    """`sslx args`, or other code; whoever starts it ends it with `stop`."""
    flags = re.sub(r"count=\d+", f"count={devices}", os.environ["XLA_FLAGS"])
    env = {name: str(value) for name, value in env.items()}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(REPO)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*args, seconds=PATIENCE, **options) -> str:
    """What `sslx args` says; it must succeed."""
    process = start(*args, **options)
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        stop(process)
    assert process.returncode == 0, said
    return said


def stop(*processes: subprocess.Popen) -> None:
    """Kill whole groups, workers too, and close their pipes."""
    for process in processes:
        if group(process):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def group(process: subprocess.Popen) -> list[int]:
    """The living processes of its group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(group) == process.pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def until(condition, *processes: subprocess.Popen, seconds=PATIENCE) -> None:
    """Wait for a condition that processes bring about."""
    end = time.time() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        assert time.time() < end, f"nothing after {seconds} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rows(path: Path) -> list[dict]:
    """metrics.jsonl of a run."""
    file = path / "metrics.jsonl"
    return [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []


def damage(path: Path, cut: bool = False) -> None:
    """Flip a bit in every 64 bytes of a checkpoint's array files, or cut them in half.

    (One bit may meet bytes that hold nothing; that each bit of an array counts is tested in
    test_checkpoint.)
    """
    for file in path.rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[::64] = bytes(byte ^ 1 for byte in data[::64])
        file.write_bytes(data[: len(data) // 2] if cut else data)
