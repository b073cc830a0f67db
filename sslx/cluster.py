"""Which processes belong to a run: how they find each other, and whether all of them came."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sslx.rendezvous import meet

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

    @property
    def names(self) -> tuple[str, ...]:
        """Every variable of it."""
        return *self.address, self.count, *self.index

    def known(self, env: Mapping[str, str]) -> list[str]:
        """Those of its variables that are set."""
        return [name for name in self.names if env.get(name)]

    def processes(self, env: Mapping[str, str]) -> int:
        """How many processes there are."""
        if self.count == "TPU_WORKER_HOSTNAMES":
            slices = whole(env, "MEGASCALE_NUM_SLICES") if env.get("MEGASCALE_NUM_SLICES") else 1
            return len(env[self.count].split(",")) * slices
        return whole(env, self.count)

    def joining(self, env: Mapping[str, str]) -> dict:
        """Arguments of jax.distributed.initialize; {} leaves all to jax.

        Raises ClusterError naming what is missing.
        """
        known = self.known(env)
        missing = [name for name in self.names if name not in known]
        if missing and not (known == [self.count] and self.processes(env) == 1):
            raise ClusterError(
                f"{', '.join(known)} set, but not {', '.join(missing)}: set all of them for "
                f"every process, or none; {BY_HAND.count}=1 is for a process alone."
            )
        if not self.address or missing:
            return slurm_devices(env) if self.name == "Slurm" else {}
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
    Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_RANK",)),
    Launcher("Slurm", "SLURM_STEP_NUM_TASKS"),
    Launcher("TPU", "TPU_WORKER_HOSTNAMES"),
)
# Each of these may be set by others, for a purpose of their own.
COMMON = {"NNODES", "NODE_RANK", "JOB_INDEX", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_PORT"}


def launcher(env: Mapping[str, str]) -> Launcher | None:
    """What started this process as one of several, as far as variables tell, or None.

    A shell in an allocation of Slurm is no step of several tasks, whatever SLURM_NTASKS says.
    Raises ClusterError for half of what a launcher sets.
    """
    for one in LAUNCHERS:
        ours = one.count not in COMMON or "JAX_COORDINATOR_IP" in env
        if env.get(one.count) and ours:
            return one
    for one in LAUNCHERS:
        known = one.known(env)
        if len(known) > 1 or set(known) - COMMON:
            one.joining(env)
    return None


def join(env: Mapping[str, str] = os.environ, timeout: int = TIMEOUT) -> None:
    """Join the other processes of this run, before anything uses a device; alone, do nothing.

    On Cloud TPU jax asks the machine itself. Raises ClusterError for half an environment, and Lost
    naming the processes that did not come.
    """
    import jax

    by = launcher(env)
    count = by.processes(env) if by else 1
    options = by.joining(env) if by else {}
    if count == 1 and (by or "SLURM_JOB_ID" in env):
        return  # jax would wait for SLURM_NTASKS processes
    if by and by.name == "TPU" and env.get("JAX_PLATFORMS") == "cpu":
        return
    if jax.distributed.is_initialized():  # by the program that calls us
        return
    try:
        if (place := whereabouts(options, timeout)) and place[1] > 1:
            slices = env.get("MEGASCALE_NUM_SLICES", "1")
            hint = f"; MEGASCALE_NUM_SLICES={slices}: are there so many slices?"
            meet(*place, timeout, hint if slices != "1" else "")
        jax.distributed.initialize(initialization_timeout=timeout, **options)
    except RuntimeError as error:
        if count == 1 and "must be called before" in str(error):
            return  # devices are in use here already, and nothing says that there are others
        raise ClusterError(
            f"joining the other processes of this run failed: {error}\n{BY_HAND.count}=1 is for a "
            f"process alone; for several set {', '.join(BY_HAND.names)} for each."
        ) from error
    except ValueError as error:
        if "be defined" not in str(error):  # jax's words for: this is no cluster that I know
            raise
        if count > 1:
            raise ClusterError(
                f"{by.count}={env[by.count]} says that {by.name} started {count} processes, but jax"
                f" finds no address to join them: set {', '.join(BY_HAND.names)} for "
                f"each."
            ) from error
        return
    if by and jax.process_count() != count:
        raise ClusterError(
            f"{by.count}={env[by.count]} says that {by.name} started {count} processes, but "
            f"{jax.process_count()} came."
        )


def whereabouts(options: Mapping, timeout: int) -> tuple[str, int, int] | None:
    """(address of process 0, processes, number of this one), as given or as jax will find them."""
    from jax._src.clusters import ClusterEnv  # no public way

    names = ("coordinator_address", "num_processes", "process_id")
    if "process_id" in options:
        return tuple(options[name] for name in names)
    *found, _ = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, timeout
    )
    return None if None in found else tuple(found)


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
