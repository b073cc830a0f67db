"""How processes find each other, by the variables that each launcher sets."""

import jax
import pytest
from commands import free_port, start, stop

from sslx import cluster
from sslx.cluster import ClusterError

INITIALIZE = jax.distributed.initialize
HAND = {
    "JAX_COORDINATOR_ADDRESS": "a:1",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
XPK_CPU = {
    "JAX_COORDINATOR_ADDRESS": "head",
    "JAX_PROCESS_COUNT": "6",
    "JOB_INDEX": "2",
    "PROCESSES_IN_JOB": "2",
    "JOB_COMPLETION_INDEX": "1",
}
XPK_GPU = {
    "JAX_COORDINATOR_IP": "10.0.0.1",
    "JAX_COORDINATOR_PORT": "1234",
    "NNODES": "2",
    "NODE_RANK": "1",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
SHELL = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}  # of salloc


@pytest.fixture(autouse=True)
def met(monkeypatch):
    """Who met whom: of processes that are not there. (For real: test_gang, and below.)"""
    calls = []
    monkeypatch.setattr(cluster, "meet", lambda *arguments: calls.append(arguments))
    return calls


def by_hand(address, count, index):
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


@pytest.mark.parametrize(
    "env, options, count",
    [
        (HAND, by_hand("a:1", 4, 3), 4),
        (XPK_CPU, by_hand("head:1234", 6, 5), 6),
        (XPK_GPU, by_hand("10.0.0.1:1234", 2, 1), 2),
        (SLURM, {}, 2),
        (SLURM | {"SLURM_GPUS_ON_NODE": "4"}, {"local_device_ids": [0, 1, 2, 3]}, 2),
        (MPI | SLURM | {"OMPI_COMM_WORLD_SIZE": "3"}, {}, 3),  # mpirun within an allocation
        (TPU, {}, 2),
        (TPU | {"MEGASCALE_NUM_SLICES": "4"}, {}, 8),
        ({}, {}, 1),  # jax asks a TPU's machine
        ({"NNODES": "7"}, {}, 1),
        ({"JOB_COMPLETION_INDEX": "3", "JAX_COORDINATOR_PORT": "1234"}, {}, 1),
        ({"JAX_NUM_PROCESSES": "1"}, None, 1),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a"}, None, 1),
        (SHELL, None, 1),
        (SHELL | {"SLURM_STEP_NUM_TASKS": "1"}, None, 1),  # an interactive step
        (TPU | {"JAX_PLATFORMS": "cpu"}, None, 2),
    ],
)
def test_processes_join_as_their_launcher_says(env, options, count, monkeypatch, met):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(jax, "process_count", lambda: count)
    cluster.join(env)
    for call in calls:
        assert call.pop("initialization_timeout") == cluster.TIMEOUT > 300
        whole = call.pop("cluster_detection_method", None) == "deactivate"
        assert whole == ("coordinator_address" in call)  # else jax finds out by itself
    assert calls == ([] if options is None else [options])
    for (address, *numbers, timeout, hint), call in zip(met, calls, strict=False):
        assert timeout == cluster.TIMEOUT and ("MEGASCALE" in hint) == ("MEGASCALE" in str(env))
        if call:  # else as jax finds them
            names = ("coordinator_address", "num_processes", "process_id")
            assert [address, *numbers] == [call[name] for name in names]
    assert cluster.several(env) == (count > 1)


@pytest.mark.parametrize(
    "env, words",
    [
        ({**HAND, "JAX_NUM_PROCESSES": ""}, "JAX_PROCESS_ID set, but not JAX_NUM_PROCESSES"),
        ({"JAX_PROCESS_ID": "0"}, "but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES set, but not JAX_COORDINATOR_ADDRESS"),
        ({**XPK_CPU, "JOB_INDEX": ""}, "but not JOB_INDEX"),
        ({"JAX_COORDINATOR_IP": "a", "NNODES": "2"}, "but not JAX_COORDINATOR_PORT, NODE_RANK"),
        ({**XPK_GPU, "NNODES": ""}, "but not NNODES"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "but not JAX_COORDINATOR_IP, JAX_COORDINATOR_PORT"),
        (
            dict.fromkeys(("JOB_INDEX", "PROCESSES_IN_JOB", "JOB_COMPLETION_INDEX"), "1"),
            "but not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT",
        ),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "but not OMPI_COMM_WORLD_SIZE"),
        (TPU | {"MEGASCALE_NUM_SLICES": "x"}, "MEGASCALE_NUM_SLICES=x is no number"),
        (HAND | {"JAX_PROCESS_ID": "4"}, "process 4 of 4, but they count from 0"),
        (HAND | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID=x is no number"),
    ],
)
def test_half_an_environment_is_refused_by_name(env, words, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: 1 / 0)
    with pytest.raises(ClusterError, match=words):
        cluster.join(env)
    assert cluster.several(env)


def test_processes_without_an_address_and_processes_that_did_not_come(monkeypatch):
    def nowhere(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nowhere)
    cluster.join({})  # alone
    with monkeypatch.context() as patch:
        patch.setattr(jax.distributed, "initialize", INITIALIZE)
        cluster.join({})  # in this very process, which has devices already
    with pytest.raises(
        ClusterError, match=r"OMPI_COMM_WORLD_SIZE=2 .* set JAX_COORDINATOR_ADDRESS"
    ):
        cluster.join(MPI)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: None)
    for env in (HAND, SLURM, MPI, TPU):
        with pytest.raises(ClusterError, match=r"says that .* started \d processes, but 1 came"):
            cluster.join(env)


@pytest.mark.parametrize("env", [{}, HAND])
def test_what_goes_wrong_in_joining_ends_the_run(env, monkeypatch):
    """As where Kubernetes does not let its jobs look each other up: N runs would train apart."""

    def refused(**options):
        raise RuntimeError("Kubernetes API Error: 403 - Forbidden")

    monkeypatch.setattr(jax.distributed, "initialize", refused)
    with pytest.raises(ClusterError, match=r"(?s)403 - Forbidden.*JAX_NUM_PROCESSES=1 is for a"):
        cluster.join(env)


def test_two_processes_of_a_launcher_join():
    """As srun and mpirun start them; jax reads the variables. Those by hand: test_resume."""
    code = (
        "import jax; from sslx.cluster import join; join();"
        "print('process', jax.process_index(), 'of', jax.process_count())"
    )
    job = free_port() % 4096  # jax makes a port of it
    ranks = [
        *(
            SLURM | {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": i}
            for i in range(2)
        ),
        *(
            {
                "OMPI_MCA_orte_hnp_uri": f"{(job + 1) * 4096}.0;tcp://127.0.0.1:1",
                "OMPI_COMM_WORLD_SIZE": 2,
                "OMPI_COMM_WORLD_RANK": i,
                "OMPI_COMM_WORLD_LOCAL_RANK": i,
            }
            for i in range(2)
        ),
    ]
    processes = [start(code=code, **env) for env in ranks]
    try:
        said = [process.communicate(timeout=100)[0].splitlines()[-1] for process in processes]
    finally:
        stop(*processes)
    assert said == ["process 0 of 2", "process 1 of 2"] * 2
