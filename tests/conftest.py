"""Eight fake devices on the CPU, for every test; set before anything imports jax."""

import os

import pytest
from commands import TINY

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # most of a test's time is compiling
        "--xla_cpu_collective_call_terminate_timeout_seconds=900",  # on a busy machine 40 abort
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
    ]
)


@pytest.fixture(scope="session")
def eight(tmp_path_factory):
    """A run of tests/tiny.py, 40 steps in one go on the eight devices of this process."""
    from sslx.cli import main

    path = tmp_path_factory.mktemp("eight")
    assert main(["train", str(TINY), "--workdir", str(path)]) == 0
    return path
