"""Which processes belong to a run: how they find each other, and whether all of them came."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

TIMEOUT = 1800  # seconds; the hosts of a gang come minutes apart, after pulling their images


class ClusterError(ValueError):
    """What the environment says of a run's processes is not whole, or not so."""


@dataclass(frozen=True)
class Launcher:
    """The variables by which something that starts processes tells each of them about all.

    count    how many there are: a number, or a list of hosts; the sign of this launcher
    index    the number of this one: of a job, of processes in each job, and within the job; or one
    address  of process 0, its host and port in one variable or two; () where jax knows how to find
             it, of what else the environment says
    port     of an address that has none
    """

    name: str
    count: str
    index: tuple[str, ...] = ()
    address: tuple[str, ...] = ()
    port: int = 0

    def processes(self, env: Mapping[str, str]) -> int:
        """How many processes there are."""
        if self.count == "TPU_WORKER_HOSTNAMES":
            hosts = len(env[self.count].split(","))
            return hosts * int(env.get("MEGASCALE_NUM_SLICES") or 1)
        return whole(env, self.count)

    def joining(self, env: Mapping[str, str]) -> dict:
        """Arguments of jax.distributed.initialize; {} leaves all to jax.

        Raises ClusterError naming what is missing.
        """
        if not self.address:
            return slurm_devices(env) if self.name == "Slurm" else {}
        names = (*self.address, self.count, *self.index)
        if missing := [name for name in names if not env.get(name)]:
            raise ClusterError(
                f"{', '.join(n for n in names if env.get(n))} is set, but "
                f"{', '.join(missing)} is not: set all of them for every process, or none."
            )
        address = ":".join(env[name] for name in self.address)
        numbers, count = [whole(env, name) for name in self.index], self.processes(env)
        index = numbers[0] if len(numbers) == 1 else numbers[0] * numbers[1] + numbers[2]
        if index >= count:
            values = ", ".join(f"{name}={env[name]}" for name in (*self.index, self.count))
            raise ClusterError(f"{values}: process {index} of {count}, but they count from 0.")
        return {
            "coordinator_address": address if ":" in address else f"{address}:{self.port}",
            "num_processes": count,
            "process_id": index,
            "cluster_detection_method": "deactivate",  # else Slurm's would leave it one GPU
        }


BY_HAND = Launcher("JAX_*", "JAX_NUM_PROCESSES", ("JAX_PROCESS_ID",), ("JAX_COORDINATOR_ADDRESS",))
LAUNCHERS = (
    BY_HAND,
    Launcher(
        "xpk on CPUs",
        "JAX_PROCESS_COUNT",
        ("JOB_INDEX", "PROCESSES_IN_JOB", "JOB_COMPLETION_INDEX"),
        ("JAX_COORDINATOR_ADDRESS",),
        port=1234,
    ),
    Launcher(
        "xpk on GPUs", "NNODES", ("NODE_RANK",), ("JAX_COORDINATOR_IP", "JAX_COORDINATOR_PORT")
    ),
    Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE"),
    Launcher("Slurm", "SLURM_STEP_NUM_TASKS"),
    Launcher("TPU", "TPU_WORKER_HOSTNAMES"),
)


def launcher(env: Mapping[str, str]) -> Launcher | None:
    """What started this process as one of several, as far as variables tell, or None.

    A shell in an allocation of Slurm is no step of several tasks, whatever SLURM_NTASKS says.
    Raises ClusterError where a number of processes is missing that other variables ask for.
    """
    for one in LAUNCHERS:
        ours = one.count != "NNODES" or "JAX_COORDINATOR_IP" in env  # other launchers have that too
        if env.get(one.count) and ours:
            return one
    if any(env.get(name) for name in (*BY_HAND.address, *BY_HAND.index)):
        BY_HAND.joining(env)
    return None


def join(env: Mapping[str, str] = os.environ, timeout: int = TIMEOUT) -> None:
    """Join the other processes of this run, before anything uses a device; alone, do nothing.

    On Cloud TPU jax asks the machine itself. Raises ClusterError for half an environment, and for
    one that tells of processes that did not come.
    """
    import jax

    by = launcher(env)
    count = by.processes(env) if by else 1
    if count == 1 and "SLURM_JOB_ID" in env:
        return  # jax would wait for SLURM_NTASKS processes
    if by and by.name == "TPU" and env.get("JAX_PLATFORMS") == "cpu":
        return
    options = by.joining(env) if by else {}
    if jax.distributed.is_initialized():  # by the program that calls us
        return
    if options.get("process_id") == 0 and count > 1:
        print(f"sslx: waiting for {count} processes", file=sys.stderr)
    try:
        jax.distributed.initialize(initialization_timeout=timeout, **options)
    except RuntimeError:
        if count > 1:
            raise
        return  # devices are in use here already, and nothing says that there are others
    except ValueError as error:
        if "be defined" not in str(error):  # jax's words for: this is no cluster that I know
            raise
        if count > 1:
            raise ClusterError(
                f"{by.count}={env[by.count]} says that {by.name} started {count} processes, but jax"
                f" finds no address to join them: set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
                f"JAX_NUM_PROCESSES and JAX_PROCESS_ID for each."
            ) from error
        return
    if by and jax.process_count() != count:
        raise ClusterError(
            f"{by.count}={env[by.count]} says that {by.name} started {count} processes, but "
            f"{jax.process_count()} came."
        )


def several(env: Mapping[str, str] = os.environ) -> bool:
    """Whether variables say that this process is one of several, in whole or in half."""
    try:
        by = launcher(env)
        return by is not None and by.processes(env) > 1
    except ClusterError:
        return True


def slurm_devices(env: Mapping[str, str]) -> dict:
    """All GPUs of a node for its only task: jax would give it the one with its local number."""
    one_each = env.get("SLURM_STEP_NUM_TASKS") == env.get("SLURM_STEP_NUM_NODES")
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    return {"local_device_ids": list(range(int(gpus)))} if one_each and gpus.isdigit() else {}


def whole(env: Mapping[str, str], name: str) -> int:
    """The value of a variable as a number; raises ClusterError where it is none."""
    if not env.get(name, "").isdigit():
        raise ClusterError(f"{name}={env.get(name)} is no number of processes.")
    return int(env[name])
