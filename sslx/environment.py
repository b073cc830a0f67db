"""By what a run was computed: versions, devices, commits and commands, in environment.json."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import sslx
from sslx.log import log, read_json, write_whole
from sslx.paths import Place

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def record(run: Place, recipe: str = "") -> None:
    """Add this start to a run's environment.json, a list; `recipe` is the folder of its recipe."""
    path = run / "environment.json"
    starts = [*read_json(path, []), environment(recipe)]
    try:
        write_whole(path, json.dumps(starts, indent=1) + "\n")
    except OSError as error:
        log.warning("%s is not written (%s); the run goes on", path, error)


def environment(recipe: str = "") -> dict[str, Any]:
    """What a run is computed by. No environment variables: they may hold secrets."""
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processes": jax.process_count(),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "backend": devices[0].client.platform_version,
        "versions": {"python": platform.python_version(), "sslx": sslx.__version__, **versions()},
        "commits": {"sslx": commit(Path(__file__).parent), "recipe": commit(recipe)},
    }


def versions() -> dict[str, str]:
    """{package: version} of what is installed, CUDA's plugin by whatever number it has."""
    found = {}
    for name in (*PACKAGES, "jax-cuda12-plugin", "jax-cuda13-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit(folder: Path | str) -> str | None:
    """The git commit of the files in a folder, with `+changes` where they differ from it; None
    without git, and for a folder of which a repository around it holds nothing."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        if not folder or not git("ls-files", "."):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
