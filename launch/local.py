#!/usr/bin/env python3
"""Run `sslx train` as one or several processes of this machine, again where that may help.

    launch/local.py RECIPE [name=value ...] --workdir RUN               one process, all devices
    launch/local.py --restart 3 RECIPE [name=value ...] --workdir RUN   again, up to three times
    launch/local.py -n 2 --cpu 4 RECIPE [name=value ...] --workdir RUN  a pod of CPUs: 2 x 4 devices
    launch/local.py -n 4 RECIPE [name=value ...] --workdir RUN          4 processes share the GPUs

The options of this launcher come first; from RECIPE on, everything is given to `sslx train`, which
must be on the PATH. `--dry-run` prints the commands. Several processes find each other by
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; what each of them prints has its
number in front.

SIGTERM, Ctrl-C and other signals that end a run are passed on: all processes save and end, and are
not started again. If one process fails, the others get SIGTERM and, after --grace seconds, SIGKILL.
The exit code is that of the first one that failed. It decides whether all are started again
(launch/README.md): never after 0, 2, 3 and 4; always after 143 if the launcher itself was not told
to end; after any other code --restart times.
"""

import argparse
import ctypes
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

FINAL = {0, 2, 3, 4}  # exit codes after which the same command would end in the same way
PREEMPTED = 128 + signal.SIGTERM
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LINE = "--xla_force_host_platform_device_count"


def main() -> int:
    options = parser().parse_args()
    if not options.train:
        parser().error("name a recipe, after the launcher's own options")
    command = ["sslx", "train", *options.train]
    if options.dry_run:
        for env in environments(options):
            print(shlex.join([*(f"{name}={value}" for name, value in env.items()), *command]))
        return 0
    if not shutil.which("sslx"):
        parser().error("no sslx on the PATH: activate the environment that has it")
    gang, restarts = Gang(options.grace), 0
    while True:
        code = gang.run(command, environments(options))
        if code in FINAL or gang.told:
            return code
        restarts += code != PREEMPTED
        if restarts > options.restart:
            return code
        said = f"launch: exit code {code}, again (restart {restarts} of {options.restart})"
        print(said, file=sys.stderr)
        gang.wait(min(60, 2**restarts))  # a disk or a peer may come back


def parser() -> argparse.ArgumentParser:
    added = argparse.ArgumentParser(
        "launch/local.py",
        usage="launch/local.py [options] RECIPE [name=value ...] --workdir RUN",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    added.add_argument("-n", type=int, default=1, metavar="N", help="processes")
    added.add_argument("--cpu", type=int, metavar="M", help="CPU devices of each process")
    added.add_argument("--restart", type=int, default=0, metavar="TIMES")
    added.add_argument("--grace", type=float, default=60, metavar="SECONDS")
    added.add_argument("--dry-run", action="store_true", help="print the commands")
    added.add_argument("train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return added


def environments(options: argparse.Namespace) -> list[dict[str, str]]:
    """What each process has in its environment beside ours."""
    if options.n < 1 or (options.cpu is not None and options.cpu < 1):
        parser().error("-n N and --cpu M count from 1")
    count, made = options.n, [{} for _ in range(options.n)]
    if options.cpu:
        flags = re.sub(rf"{LINE}=\d+", "", os.environ.get("XLA_FLAGS", ""))
        flags = " ".join([*flags.split(), f"{LINE}={options.cpu}"])
        made = [{"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} for _ in made]
    if count == 1:
        return made
    if not options.cpu:
        gpus = visible_gpus()
        if not gpus or len(gpus) % count:
            parser().error(f"-n {count} does not divide {len(gpus)} GPUs; --cpu M is for a CPU")
        each = len(gpus) // count
        made = [
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])}
            for i in range(count)
        ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    join = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [env | join | {"JAX_PROCESS_ID": str(i)} for i, env in enumerate(made)]


def visible_gpus() -> list[str]:
    if listed := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return listed.split(",")
    if not shutil.which("nvidia-smi"):
        return []
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i in range(said.count("GPU "))]


class Gang:
    """Processes that start and end together. `told` is whether a signal told them to end."""

    def __init__(self, grace: float):
        self.grace, self.told, self.signals = grace, False, []
        for signum in ENDING:
            if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has SIGHUP
                signal.signal(signum, lambda signum, frame: self.signals.append(signum))

    def run(self, command: list[str], environments: list[Mapping[str, str]]) -> int:
        """The exit code of the first process that failed, once all have ended; 0 if none did."""
        processes = [started(command, env, len(environments) > 1) for env in environments]
        copies = [
            threading.Thread(target=copy, args=(i, process), daemon=True)
            for i, process in enumerate(processes)
            if process.stdout
        ]
        for thread in copies:
            thread.start()
        first, deadline = 0, float("inf")
        while any(living := [process for process in processes if process.poll() is None]):
            while self.signals:
                self.told = True
                send(self.signals.pop(0), living)
            codes = (process.returncode for process in processes)
            if not first and (first := next((code for code in codes if code), 0)):
                send(signal.SIGTERM, living)
                deadline = time.monotonic() + self.grace
            if time.monotonic() > deadline:
                send(signal.SIGKILL, living)
            time.sleep(0.02)
        first = first or next(
            (process.returncode for process in processes if process.returncode), 0
        )
        for thread in copies:
            thread.join(5)  # a worker of a killed process may hold the pipe for a moment
        return first if first >= 0 else 128 - first

    def wait(self, seconds: float) -> None:
        """Sleep, or until a signal comes; it ends the next processes before they have begun."""
        end = time.monotonic() + seconds
        while not self.signals and time.monotonic() < end:
            time.sleep(0.1)


def started(command: list[str], env: Mapping[str, str], piped: bool) -> subprocess.Popen:
    """A process in a session of its own: a terminal's Ctrl-C reaches it through us alone."""
    return subprocess.Popen(
        command,
        env=os.environ | env,
        stdout=subprocess.PIPE if piped else None,
        stderr=subprocess.STDOUT if piped else None,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the launcher is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def send(signum: int, processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if signum == signal.SIGKILL:
            os.killpg(process.pid, signum)  # data workers too
        else:
            process.send_signal(signum)


def copy(index: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        try:
            sys.stdout.buffer.write(b"[%d] %s" % (index, line))
            sys.stdout.buffer.flush()
        except OSError:
            pass  # nobody reads; the process goes on


if __name__ == "__main__":
    sys.exit(main())
