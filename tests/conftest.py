"""Eight fake devices on the CPU, for every test; set before anything imports jax."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

import pytest
from commands import TINY

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # most of a test's time is compiling
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_collective_call_terminate_timeout_seconds=900",  # on a busy machine 40 abort
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
    ]
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # others end at an unknown flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # half of a compilation
# Threads of XLA's pool. With one for each device, two collectives of one device at a time leave
# none for another device's, and all wait for ever.
os.environ["NPROC"] = "32"
# Every process of a session, workers and commands, compiles what another has not.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sslx-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def eight(tmp_path_factory):
    """A run of tests/tiny.py, 40 steps in one go on the eight devices of this process."""
    from sslx.cli import main

    path = tmp_path_factory.mktemp("eight")
    assert main(["train", str(TINY), "--workdir", str(path)]) == 0
    return path
