"""Silent data corruption: a flipped bit of one device is found within the period, and named."""

import functools
import re
from collections import Counter
from pathlib import Path
from unittest.mock import NonCallableMock

import jax
import numpy as np
import pytest
from commands import PATIENCE, TINY, free_port, rows, start, stop
from contract import mesh_of

from sslx import engine
from sslx.audit import Audit, Corrupted
from sslx.checkpoint import Checkpoints, digest, load
from sslx.cli import main
from sslx.digest import named
from sslx.log import Log
from sslx.ops.trees import path_of
from sslx.recipes import load as recipe
from sslx.state import fresh_state

KERNEL = "encoder/mlp/kernel"  # [16, 16], cut over fsdp and tensor
BIAS = "pixels/bias"  # whole on every device


def flipped(x, device: int):
    """The array with one bit of what a device holds of it flipped, where the device is ours."""
    parts = []
    for shard in x.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id == device:
            part.view(np.uint32).flat[-1] ^= 1 << 20
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def with_flip(state, path: str, device: int):
    """A state in which a device holds another bit of one of the params."""
    harm = lambda keys, x: flipped(x, device) if path_of(keys) == path else x  # noqa: E731
    return state.replace(params=jax.tree_util.tree_map_with_path(harm, state.params))


@functools.cache
def compiled(mesh):
    return engine.jitted_step(recipe(TINY), mesh)


def train(path, mesh, harm=lambda step, call, state: state, every=3):
    """Seven steps of tests/tiny.py; `harm(step, call, state)` is what the state becomes after each
    call of the step, of which an audited step has two. -> (state, {step: calls})"""
    config, step_fn, calls = recipe(TINY), compiled(mesh), Counter()
    log, checkpoints = Log(path, 7), Checkpoints(path / "checkpoints")

    def harmed(state, batch):
        step = int(state.step) + 1
        calls[step] += 1
        state, metrics = step_fn(state, batch)
        return harm(step, calls[step], state), metrics

    try:
        with jax.set_mesh(mesh), engine.feed(config, mesh, 0) as (batches, _):
            audit, state = Audit(every, harmed, mesh, log, checkpoints), fresh_state(config, mesh)
            for step in range(1, 8):
                state, _ = audit(step, state, next(batches))
    finally:
        log.close()
        checkpoints.close()
    return state, calls


def named_devices(error: str) -> set[int]:
    return {int(n) for n in re.findall(r"device (\d+) \(cpu, number \d+ of process \d on", error)}


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 2, 1)], ids=str)
def test_a_flipped_bit_is_found_within_the_period_and_named(tmp_path, shape):
    """Where two devices hold the same part, both are named."""
    mesh, device = mesh_of(*shape), 5
    params = named(fresh_state(recipe(TINY), mesh).params)
    for path in (KERNEL, BIAS):
        held = {s.device.id: str(s.index) for s in params[path].addressable_shards}
        copies = {d for d in held if held[d] == held[device]}
        assert len(copies) == (8 if path == BIAS else shape[0])

        def flip(step, call, state, path=path):
            return with_flip(state, path, device) if step == 4 else state

        with pytest.raises(Corrupted) as caught:
            train(tmp_path, mesh, flip)
        error = str(caught.value)
        assert error.startswith("Step 6: silent data corruption. device ")
        assert named_devices(error) == ({device} if len(copies) > 2 else copies)
        had = "unlike copies of" if len(copies) == 2 else "the rarest value of"
        assert f" had {had} params/{path}" in error and " before the step" in error
        assert "The last audit without a finding was at step 3, and no checkpoint is from" in error


def test_a_sound_run_is_not_disturbed(tmp_path):
    """It computes what it does without audits, to the last bit, by a program that is compiled once,
    and says what they took."""
    mesh, programs = mesh_of(4, 2, 1), []
    for name in ("audited", "plain"):
        (tmp_path / name).mkdir()

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration" and "train_step" in fun_name:
            programs.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        plain, calls = train(tmp_path / "plain", mesh, every=None)
        assert set(calls.values()) == {1} and len(programs) <= 1  # none where another test was here
        programs.clear()
        audited, calls = train(tmp_path / "audited", mesh)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert calls == {1: 1, 2: 1, 3: 2, 4: 1, 5: 1, 6: 2, 7: 1} and programs == []
    assert digest(audited) == digest(plain)
    assert [r["step"] for r in rows(tmp_path / "audited") if r["audit/seconds"] > 0] == [3, 6]


def test_a_device_that_computes_otherwise_the_second_time(tmp_path):
    def flip(step, call, state):
        return with_flip(state, KERNEL, 3) if call == 2 else state

    with pytest.raises(Corrupted, match="left other bits of params/encoder/mlp/kernel") as caught:
        train(tmp_path, mesh_of(2, 2, 2), flip)
    assert named_devices(str(caught.value)) == {3} and "Step 3: " in str(caught.value)
    assert "This process has made no audit before, and no checkpoint" in str(caught.value)


def test_an_error_that_every_device_took_over_is_said_to_be_anyone_s(tmp_path):
    def double(step, call, state):
        return state.replace(params=jax.tree.map(lambda x: x * call, state.params))

    with pytest.raises(Corrupted, match="if these are all devices, one erred before") as caught:
        train(tmp_path, mesh_of(2, 2, 2), double)
    assert len(named_devices(str(caught.value))) == 8


def test_an_audited_step_is_compiled_for_equal_results():
    """On a GPU; sums by atomic operations would differ from run to run."""
    gpu = NonCallableMock(spec=jax.Device, platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    name = "xla_gpu_exclude_nondeterministic_ops"

    def given(*overrides, devices=(gpu,)):
        return engine.compiler_options(recipe(TINY, *overrides), devices)

    assert name not in given() and given("audit_every=9") == {**given(), name: True}
    assert given("audit_every=9", f"compiler={{{name!r}: False}}")[name] is False
    assert name not in given("audit_every=9", devices=jax.devices())


# ---- the command ----


def harmed(jitted_step):
    """`engine.jitted_step` with a bit of device 6 flipped after step 10."""

    def harmed_step(config, mesh):
        step_fn = jitted_step(config, mesh)

        def step(state, batch):
            state, metrics = step_fn(state, batch)
            device = mesh.devices.flat[6].id
            return with_flip(state, BIAS, device) if int(state.step) == 10 else state, metrics

        step.trace = step_fn.trace
        return step

    return harmed_step


def steps(path):
    return Checkpoints(path / "checkpoints").steps()


def test_the_command_stops_and_goes_on_elsewhere(eight, tmp_path, monkeypatch, capfd):
    """Step 12 is not saved, although it is due; step 9 is doubtful, for the audit before is 6's."""
    run = ("train", str(TINY), "audit_every=6", "save_every=3", "--workdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "jitted_step", harmed(engine.jitted_step))
        assert main([*run]) == 4
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("sslx: Step 12: silent data corruption. device 6 (cpu, number 6 of ")
    assert "the checkpoints of step 9 may hold the error; remove them from" in error
    assert steps(tmp_path) == [3, 6, 9]
    assert main([*run]) == 0
    assert digest(load(tmp_path / "checkpoints", 40)) == digest(load(eight / "checkpoints", 40))


def test_two_processes_name_the_same_device_and_both_end(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_audit; from sslx import engine; from sslx.cli import main\n"
        "engine.jitted_step = test_audit.harmed(engine.jitted_step)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    join = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": 2}
    run = ("train", TINY, "audit_every=6", "--workdir", tmp_path)
    both = [start(*run, devices=4, code=code, JAX_PROCESS_ID=i, **join) for i in (0, 1)]
    try:
        said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    finally:
        stop(*both)
    assert [process.returncode for process in both] == [4, 4], said
    found = {re.search(r"Step 12: silent data corruption. (device.*?\))", x)[1] for x in said}
    [name] = found
    assert re.fullmatch(r"device \d+ \(cpu, number 2 of process 1 on \S+\)", name)
