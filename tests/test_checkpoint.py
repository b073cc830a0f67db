"""Checkpoints survive flipped bits, full disks, kills and moves to other devices."""

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sslx import checkpoint
from sslx.checkpoint import (
    CheckpointError,
    Checkpoints,
    Retention,
    check_path,
    digest,
    load,
)

P = PartitionSpec
REPO = Path(__file__).parents[1]


def mesh(*shape):
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def state(seed=0, where=None, spec=P("a", "b")):
    """Odd shapes and every kind of dtype a run carries; optax-like nesting with empty parts."""
    r = np.random.default_rng(seed)
    tree = {
        "step": np.int32(seed),
        "params": {"dense.0": {"kernel": r.standard_normal((64, 48)).astype(np.float32)}},
        "buffers": {
            "half": r.standard_normal((64, 32)).astype(jnp.bfloat16),
            "queue": r.integers(0, 255, (16, 24)).astype(np.uint8),
            "mask": r.integers(0, 2, (8, 8)).astype(bool),
            "none": None,
        },
        "opt_state": ((), [r.standard_normal((32, 24)).astype(np.float16)], {"count": np.int32(7)}),
    }
    tree = jax.tree.map(jnp.asarray, tree) | {"key": jax.random.key(seed)}
    if where is None:
        return tree
    return jax.device_put(tree, jax.tree.map(lambda x: place(x, where, spec), tree))


def place(x, where, spec=P("a", "b")):
    return NamedSharding(where, spec if x.ndim == 2 else P())


def abstract(tree, where=None, spec=P("a", "b")):
    def leaf(x):
        sharding = x.sharding if where is None else place(x, where, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)


def raw(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and raw(x).tobytes() == raw(y).tobytes()


@pytest.fixture
def saved(tmp_path):
    """Steps 1, 2, 3 on disk, and the object that wrote them."""
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def reopen(checkpoints):
    return Checkpoints(checkpoints.directory, checkpoints.keep)


def chunks(step_dir):
    """The data files of the arrays, largest first."""
    files = [f for f in Path(step_dir).rglob("*") if f.is_file() and f.parent.name == "d"]
    return sorted(files, key=lambda f: -f.stat().st_size)


# ---- digest ----


def numpy_digest(x):
    """The same two sums, written again from their description."""
    x = np.asarray(x)
    if x.dtype.itemsize == 8:
        x = x[..., None].view(np.uint32)
    bits = x.view(f"u{x.dtype.itemsize}").astype(np.uint64)
    M = np.uint64(2**32 - 1)

    def mix(v):
        v = ((v ^ (v >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & M
        v = ((v ^ (v >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & M
        return v ^ (v >> np.uint64(16))

    place = np.zeros(bits.shape, np.uint64)
    for index in np.indices(bits.shape):
        place = mix((place + (index.astype(np.uint64) ^ np.uint64(0x9E3779B9))) & M)
    linear = int(((bits * (place | np.uint64(1))) & M).sum()) % 2**32
    return linear << 32 | int(mix(bits ^ place).sum()) % 2**32


DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn"]
DTYPES += ["bool", "int8", "uint8", "int16", "int32", "uint32", "int64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_is_the_one_in_numpy(dtype):
    r = np.random.default_rng(0)
    for shape in ((), (1,), (5,), (3, 4), (2, 3, 5), (0, 3)):
        x = np.asarray(r.standard_normal(shape) * 9).astype(jnp.dtype(dtype))
        assert digest({"x": x}) == {"x": numpy_digest(x)}


def test_digest_does_not_depend_on_the_sharding():
    want = digest(state())
    assert set(want) >= {"params/dense.0/kernel", "opt_state/1/0", "opt_state/2/count", "key"}
    assert len(set(want.values())) == len(want)
    for shape, spec in [((8, 1), P("a", "b")), ((2, 4), P("b", "a")), ((4, 2), P(None, "b"))]:
        assert digest(state(where=mesh(*shape), spec=spec)) == want


def test_the_digest_of_a_mesh_is_one_program_and_one_fetch(monkeypatch):
    from sslx import digest as module

    fetched, run = [], []
    fetch, lanes = jax.device_get, module._lanes
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x.shape) or fetch(x))
    monkeypatch.setattr(module, "_lanes", lambda xs: run.append(len(xs)) or lanes(xs))
    tree = state(where=mesh(4, 2))
    assert len(digest(tree)) == run[0] == 8 and fetched == [(8, 2)] and len(run) == 1
    assert lanes([*jax.tree.leaves(tree["buffers"])]).sharding.is_fully_replicated


def test_the_loop_and_what_restores_outside_share_that_program():
    where, compiled = mesh(4, 2), []
    tree = state(where=where)
    there = digest(tree)

    def listen(event, seconds, **_):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with jax.set_mesh(where):
            assert digest(tree) == there
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in compiled if "compile" in event]


def test_digest_of_sharded_arrays_materializes_nothing():
    from sslx.digest import _lanes

    sharding = NamedSharding(mesh(4, 2), P("a", "b"))
    x = jax.ShapeDtypeStruct((4096, 2048), jnp.float32, sharding=sharding)  # 4 MB a device
    compiled = _lanes.lower([x]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100_000


def test_every_single_bit_counts_in_both_halves():
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    (want,) = digest({"x": x}).values()
    for bit in range(x.size * 32):
        y = x.copy()
        y.view(np.uint32).reshape(-1)[bit // 32] ^= np.uint32(1 << bit % 32)
        (got,) = digest({"x": y}).values()
        assert got >> 32 != want >> 32 and got % 2**32 != want % 2**32


def test_digest_sees_two_signs_flipped_and_elements_swapped():
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    y = x.copy()
    y[3, 5], y[60, 2] = -y[3, 5], -y[60, 2]
    assert digest({"x": x}) != digest({"x": y})
    assert digest({"x": x}) != digest({"x": x[::-1].copy()}) != digest({"x": x.T.copy()})


# ---- round trips ----


def test_round_trip_with_typed_keys(saved):
    step, got = reopen(saved).restore(abstract(state()))
    assert step == 3
    assert_equal(got, state(3))
    assert jax.random.key_impl(got["key"]) == jax.random.key_impl(state()["key"])


def test_a_given_step(saved):
    step, got = reopen(saved).restore(abstract(state()), step=2)
    assert step == 2
    assert_equal(got, state(2))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9, only of \[1, 2, 3\]"):
        reopen(saved).restore(abstract(state()), step=9)


def test_on_another_mesh(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state(5, mesh(4, 2)))
    for where in (mesh(2, 1), mesh(2, 4), mesh(1, 1)):
        step, got = checkpoints.restore(abstract(state(), where, P("b", "a")))
        assert step == 5
        assert_equal(got, state(5))
        assert got["params"]["dense.0"]["kernel"].sharding.is_equivalent_to(
            NamedSharding(where, P("b", "a")), 2
        )
    checkpoints.close()


def test_the_state_may_be_donated_right_after_save(tmp_path):
    where = NamedSharding(mesh(8, 1), P("a"))
    x = {"x": jax.device_put(jnp.arange(2_000_000, dtype=jnp.float32), where)}
    want = digest(x)
    checkpoints, move = Checkpoints(tmp_path), jax.jit(lambda s: {"x": -s["x"]}, donate_argnums=0)
    checkpoints.save(1, x)
    jax.block_until_ready(move(x))  # a CPU copies what is still read; an accelerator writes over it
    _, got = checkpoints.restore({"x": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)})
    assert digest(got) == want
    checkpoints.close()


def test_under_a_transfer_guard(tmp_path):
    checkpoints, x = Checkpoints(tmp_path), state(1, mesh(4, 2))
    with jax.transfer_guard("disallow"):
        checkpoints.save(1, x)
        assert checkpoints.restore(abstract(x))[0] == 1
    checkpoints.close()


def test_load_needs_no_recipe(saved):
    got = load(saved.directory)
    want = state(3)
    assert (
        got["params"]["dense.0"]["kernel"].tobytes()
        == raw(want["params"]["dense.0"]["kernel"]).tobytes()
    )
    assert got["buffers"]["half"].dtype == jnp.bfloat16
    assert set(got["opt_state"]) == {"1", "2"} and got["step"] == 3
    assert np.array_equal(got["key"], jax.random.key_data(want["key"]))
    damage(saved.directory / "3", want)
    assert load(saved.directory)["step"] == 2
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(saved.directory / "elsewhere")


def test_nothing_there(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.restore(abstract(state())) is None
    assert checkpoints.steps() == []
    checkpoints.close()


def test_what_all_devices_hold_is_cut_only_where_it_is_large(tmp_path):
    whole = NamedSharding(mesh(8, 1), P())
    arrays = {"small": np.zeros((64, 64), np.float32), "large": np.zeros((8, 2**18), np.float32)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.device_put(arrays, whole))
    checkpoints.close()
    saved = ocp.PyTreeCheckpointHandler().metadata(tmp_path / "1").tree
    parts = {name: x.storage.chunk_shape for name, x in saved.items()}
    assert parts == {"small": (64, 64), "large": (1, 2**18)}


# ---- damage ----


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def whereabouts(step_dir, x):
    """The file that holds the bytes of x, and the bit at which they start."""
    data = raw(x).tobytes()
    for file in chunks(step_dir):
        if (start := file.read_bytes().find(data)) >= 0:
            return file, 8 * start, 8 * len(data)
    raise AssertionError("the array is nowhere to be found")


def damage(step_dir, tree):
    file, start, _ = whereabouts(step_dir, tree["params"]["dense.0"]["kernel"])
    flip(file, start + 1000)


def test_every_flipped_bit_of_an_array_is_seen(saved, caplog):
    r, good = random.Random(0), state(3)
    for x in (
        good["params"]["dense.0"]["kernel"],
        good["buffers"]["half"],
        good["opt_state"][1][0],
    ):
        file, start, bits = whereabouts(saved.directory / "3", x)
        before = file.read_bytes()
        for _ in range(10):
            flip(file, start + r.randrange(bits))
            step, got = reopen(saved).restore(abstract(good))
            assert step == 2
            assert_equal(got, state(2))
            file.write_bytes(before)
    assert "step 3: damaged: params/dense.0/kernel" in caplog.text
    assert "step 3: damaged: buffers/half" in caplog.text


def test_flips_in_any_file_walk_back_and_never_look_like_another_state(saved):
    r = random.Random(1)
    for file in sorted(f for f in Path(saved.directory / "3").rglob("*") if f.is_file()):
        before = file.read_bytes()
        for _ in range(3):
            flip(file, r.randrange(8 * len(before)))
            step, got = reopen(saved).restore(abstract(state()))
            assert_equal(got, state(step))
            file.write_bytes(before)


def test_a_damaged_record_is_not_another_state(saved, caplog):
    file = saved.directory / "3" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace("float32[64,48]", "float32[64,49]"))
    assert reopen(saved).restore(abstract(state()))[0] == 2
    assert "step 3: ValueError: the record of the arrays is damaged" in caplog.text


def test_one_lost_sign_does_not_hide_a_checkpoint(saved):
    (saved.directory / "2" / "_CHECKPOINT_METADATA").unlink()
    (saved.directory / "3" / "commit_success.txt").unlink()
    assert reopen(saved).steps() == [1, 2, 3]
    assert reopen(saved).restore(abstract(state()))[0] == 3


def test_the_record_lies_where_orbax_puts_it(saved):
    """The one file name of orbax's that checkpoint.py reads by itself."""
    text = (saved.directory / "3" / "_CHECKPOINT_METADATA").read_text()
    record = json.loads(text)["custom_metadata"]["arrays"]
    assert record["step"] == ["int32[]", digest(state(3))["step"]]
    assert record["key"][0] == "key<fry>[]"


@pytest.mark.parametrize("how", ["truncate", "empty", "delete"])
def test_truncated_and_missing_files(saved, how, caplog):
    missed = []
    for file in sorted(f for f in Path(saved.directory / "3").rglob("*") if f.is_file()):
        before = file.read_bytes()
        if how == "delete":
            file.unlink()
        else:
            file.write_bytes(before[: len(before) // 2 if how == "truncate" else 0])
        step, got = reopen(saved).restore(abstract(state()))
        assert_equal(got, state(step))
        missed += [file] if step == 3 else []
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(before)
    assert "checkpoint skipped: step 3: " in caplog.text
    # Among those that orbax does not read: _sharding, commit_success.txt, nodes it has merged.
    assert not {f.name for f in missed} & {"_METADATA", "_CHECKPOINT_METADATA"}
    assert not set(missed) & set(chunks(saved.directory / "3")[:2]), missed


ODD = ["a b", "ü猫", "%20", "#", "{a,b}", "]", "~x", "quo'te", "new\nline", "-x", "$HOME"]
ODD += ["[x]", "a?b", "a*b", "back\\slash", "b\udce9d"]


def test_a_path_is_refused_or_can_be_read_again(tmp_path):
    refused = []
    for name in ODD:
        directory = tmp_path / name / "checkpoints"
        try:
            check_path(directory)
        except ValueError as error:
            refused.append(name)
            assert "name another directory" in str(error) and str(error).isprintable()
            continue
        checkpoints = Checkpoints(directory)
        save_all(checkpoints, [1])
        assert checkpoints.good() == [1] and load(directory)["x"].tolist() == [1] * 3
        checkpoints.close()
    assert refused == ODD[-5:]


def test_what_cannot_be_opened_after_its_save_is_lost(tmp_path, caplog, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save_all(checkpoints, [1])
    wait = type(checkpoints._orbax).wait_until_finished

    def forgets(orbax):
        wait(orbax)
        for file in tmp_path.glob("2/manifest.ocdbt"):
            file.unlink()

    monkeypatch.setattr(type(checkpoints._orbax), "wait_until_finished", forgets)
    save_all(checkpoints, [2])
    assert "checkpoint of step 2 is lost (ValueError: " in caplog.text
    assert "the newest good one is step 1; the run goes on" in caplog.text
    assert checkpoints.good() == [1]
    save_all(checkpoints, [3])
    assert checkpoints.good() == [1, 3]
    checkpoints.close()


def test_a_listing_that_is_late_hides_and_removes_nothing(tmp_path, monkeypatch):
    """As on object stores and shared disks, where what was just written is not listed yet."""
    checkpoints = Checkpoints(tmp_path, Retention(last=2))
    save_all(checkpoints, [1, 2])
    late, finished = [tmp_path / "1"], checkpoint._finished
    monkeypatch.setattr(type(checkpoints.directory), "iterdir", lambda path: map(type(path), late))
    monkeypatch.setattr(checkpoint, "_finished", lambda path: path.name != "2" and finished(path))
    assert checkpoints.good() == [1, 2]
    late.append(tmp_path / "2")  # listed, but not yet its mark
    save_all(checkpoints, [3, 4])
    assert checkpoints.good() == [3, 4]  # 1 is still listed
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]
    checkpoints.close()


def test_a_checkpoint_that_this_host_does_not_see_yet_is_waited_for(tmp_path, caplog, monkeypatch):
    checkpoints, seen = Checkpoints(tmp_path), []
    save_all(checkpoints, [1, 2])
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, "of_first", lambda x: np.where(x == 1, 2, -1))
    monkeypatch.setattr(Checkpoints, "steps", lambda self: [1])
    monkeypatch.setattr(checkpoint, "_finished", lambda p: seen.append(p.name) or len(seen) > 4)
    assert checkpoints.restore(X)[0] == 2
    assert f"waiting up to 60 s until this host sees {tmp_path}/2" in caplog.text
    assert seen[-3:] == ["2"] * 3
    monkeypatch.setattr(checkpoint, "PATIENCE", 0)
    monkeypatch.setattr(checkpoint, "_finished", lambda path: False)
    monkeypatch.setattr(checkpoint, "of_first", lambda x: np.where(x == 1, 7, -1))
    with pytest.raises(CheckpointError, match="step 7: FileNotFoundError"):
        Checkpoints(tmp_path).restore(X)
    checkpoints.close()


def test_none_verifies_is_an_error_that_lists_each(saved):
    for step in (1, 2):
        damage(saved.directory / str(step), state(step))
    shutil.rmtree(saved.directory / "3" / "ocdbt.process_0")
    with pytest.raises(CheckpointError) as error:
        reopen(saved).restore(abstract(state()))
    assert "no checkpoint in" in str(error.value)
    assert "step 1: damaged: " in str(error.value) and "step 2: damaged: " in str(error.value)
    assert "step 3: " in str(error.value)


def test_stray_directories(saved, caplog):
    (saved.directory / "9").mkdir()
    (saved.directory / "8.orbax-checkpoint-tmp").mkdir()
    again = reopen(saved)
    assert again.steps() == [1, 2, 3]
    assert again.restore(abstract(state()))[0] == 3
    assert "9 is not finished" in caplog.text
    assert "8.orbax-checkpoint-tmp is not finished" in caplog.text
    again.save(9, state(9))  # over the empty one
    again.wait()
    assert again.restore(abstract(state()))[0] == 9
    assert not (saved.directory / "8.orbax-checkpoint-tmp").exists()


def test_what_the_user_put_beside_checkpoints_stays(saved):
    (saved.directory / "2.bak").mkdir()
    (saved.directory / "02").mkdir()
    for name in ("7", "notes.txt", ".DS_Store", "8.txt"):
        (saved.directory / name).touch()
    again = reopen(saved)
    assert again.steps() == [1, 2, 3] and again.restore(abstract(state()))[0] == 3
    again.save(4, state(4))
    again.wait()
    assert {"2.bak", "02", "7", "notes.txt", "8.txt"} <= set(os.listdir(saved.directory))
    again.close()


def test_only_strays_is_a_new_run(tmp_path, caplog):
    (tmp_path / "9").mkdir()
    assert Checkpoints(tmp_path).restore(abstract(state())) is None
    assert "9 is not finished" in caplog.text


# ---- another state ----


def test_another_state_is_told_apart_from_damage(saved):
    other = abstract(state())
    other["params"]["dense.0"]["kernel"] = jax.ShapeDtypeStruct((64, 49), jnp.bfloat16)
    other["buffers"]["quene"] = other["buffers"].pop("queue")
    other["extra"] = jax.ShapeDtypeStruct((), jnp.int32)
    other["key"] = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    with pytest.raises(CheckpointError) as error:
        reopen(saved).restore(other)
    text = str(error.value)
    assert "params/dense.0/kernel is float32[64,48] on disk, bfloat16[64,49] here" in text
    assert "buffers/queue is only on disk (here: buffers/quene)" in text
    assert "buffers/quene is only here (on disk: buffers/queue)" in text
    assert "extra is only here\n" in text
    assert "key is key<fry>[] on disk, key<rbg>[] here" in text
    assert "recipe" in text


def test_a_long_difference_is_cut(saved):
    other = {f"layer{i}": jax.ShapeDtypeStruct((), jnp.int32) for i in range(50)}
    with pytest.raises(CheckpointError) as error:
        reopen(saved).restore(other)
    assert len(str(error.value).splitlines()) == 10 and "more" in str(error.value)


# ---- which stay ----


def save_all(checkpoints, steps):
    for step in steps:
        checkpoints.save(step, {"x": jnp.full(3, step)})
    checkpoints.wait()


X = {"x": jax.ShapeDtypeStruct((3,), jnp.int32)}


def test_retention(tmp_path):
    checkpoints = Checkpoints(tmp_path, Retention(last=2, every=4))
    save_all(checkpoints, range(1, 11))
    assert checkpoints.steps() == [4, 8, 9, 10]
    checkpoints.close()
    for wrong in ({"last": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="keeps no checkpoint"):
            Retention(**wrong)


def test_damaged_ones_do_not_push_out_the_newest_good_one(tmp_path):
    first = Checkpoints(tmp_path)
    save_all(first, [10])
    shutil.copytree(tmp_path / "10", tmp_path / "20")
    shutil.copytree(tmp_path / "10", tmp_path / "30")
    for step in (20, 30):
        (tmp_path / str(step) / "_CHECKPOINT_METADATA").write_text("{")
    again = Checkpoints(tmp_path, Retention(last=2))
    assert again.restore(X)[0] == 10
    save_all(again, [40])  # so the newest good ones are 10 and 40
    assert again.steps() == [10, 20, 30, 40]
    shutil.rmtree(tmp_path / "40")
    again = Checkpoints(tmp_path, Retention(last=1))
    assert again.restore(X)[0] == 10
    save_all(again, [15])  # not 30, which counts as newer, but cannot be read
    assert again.steps() == [15, 20, 30]
    save_all(again, [20])  # over the damaged one
    assert Checkpoints(tmp_path).restore(X, step=20)[1]["x"].tolist() == [20] * 3
    assert again.steps() == [20, 30]


def test_going_back_keeps_what_was_gone_back_to(tmp_path):
    save_all(Checkpoints(tmp_path), [10, 20, 30])
    again = Checkpoints(tmp_path, Retention(last=1))
    assert again.restore(X, step=10)[0] == 10
    save_all(again, [15])  # 20 and 30 are newer, but not its past
    assert again.steps() == [15, 20, 30]


def test_the_same_step_is_not_written_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save_all(checkpoints, [1])
    before = (tmp_path / "1").stat().st_mtime_ns
    save_all(checkpoints, [1])
    assert (tmp_path / "1").stat().st_mtime_ns == before


def test_a_failed_deletion_is_a_warning(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path, Retention(last=1))
    save_all(checkpoints, [1])

    def refuse(path, missing_ok=False):
        raise PermissionError("read-only")

    monkeypatch.setattr(type(checkpoints.directory), "rmtree", refuse)
    save_all(checkpoints, [2])
    assert checkpoints.steps() == [1, 2]
    assert "could not be deleted (PermissionError: read-only)" in caplog.text


# ---- disks and kills ----


@pytest.fixture
def small_disk(tmp_path):
    """Three megabytes that are really all there is."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"FULL DISK IS NOT TESTED: mounting a tmpfs needs root ({done.stderr.strip()})")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_stops_nothing(small_disk, caplog):
    checkpoints = Checkpoints(small_disk / "run", Retention(last=1))
    big = {"x": jnp.arange(500_000, dtype=jnp.float32)}  # two megabytes
    checkpoints.save(1, big)
    checkpoints.save(2, big)
    checkpoints.save(3, big)
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    ours = [r for r in caplog.records if r.name == "sslx"]  # orbax says it too, at length
    errors = [r.getMessage() for r in ours if r.levelno == logging.ERROR]
    assert len(errors) == len(ours) == 2
    assert "checkpoint of step 2 is lost (" in errors[0] and "o space left" in errors[0]
    assert "the newest good one is step 1; the run goes on" in errors[0]
    assert not [p for p in (small_disk / "run").iterdir() if p.name != "1"]
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    checkpoints.save(4, big)
    checkpoints.wait()
    assert checkpoints.steps() == [4]
    assert digest(load(small_disk / "run")) == digest(big)
    checkpoints.close()


def test_a_full_disk_is_told_in_one_line(small_disk):
    process = child(
        """
        import logging, sys, jax.numpy as jnp
        from sslx.checkpoint import Checkpoints
        logging.basicConfig(format="%(message)s")
        checkpoints = Checkpoints(sys.argv[1])
        for step in (1, 2, 3):
            checkpoints.save(step, {str(i): jnp.ones(5_000) for i in range(75)})  # 1.5 MB
        checkpoints.close()
        """,
        small_disk / "run",
    )
    text, _ = process.communicate(timeout=240)
    lines = text.splitlines()
    assert process.returncode == 0 and len(lines) == 2, text
    assert "step 2 is lost (OSError: [Errno 28] No space left on device, 1.8 MiB are" in lines[0]


def test_a_disk_without_room_for_a_directory(small_disk, caplog):
    subprocess.run(["mount", "-o", "remount,nr_inodes=3", small_disk], check=True)
    checkpoints = Checkpoints(small_disk / "run")
    start = time.time()
    save_all(checkpoints, [1])
    assert time.time() - start < 20
    assert "checkpoint of step 1 is lost (" in caplog.text and "there is no other" in caplog.text
    subprocess.run(["mount", "-o", "remount,nr_inodes=900", small_disk], check=True)
    save_all(checkpoints, [2])
    assert checkpoints.steps() == [2]
    checkpoints.close()


def test_a_disk_that_turns_read_only_and_one_that_fails(small_disk, caplog, monkeypatch):
    checkpoints = Checkpoints(small_disk / "run", Retention(last=1))
    save_all(checkpoints, [1])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    save_all(checkpoints, [2])
    assert "step 2 is lost (OSError: [Errno 30] Read-only file system" in caplog.text
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    save_all(checkpoints, [3])
    assert checkpoints.steps() == [3]
    with monkeypatch.context() as patch:

        def broken(path):
            raise OSError("Input/output error")

        patch.setattr(type(checkpoints.directory), "iterdir", broken)
        save_all(checkpoints, [4])
        assert "step 4 is lost (OSError: Input/output error); the others cannot" in caplog.text
        with pytest.raises(OSError, match="Input/output"):  # not: a new run
            checkpoints.restore(X)
    save_all(checkpoints, [5])
    assert checkpoints.steps() == [5]
    checkpoints.close()


def child(code, *args, devices=1, **env):
    """A process of its own that runs `code`."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)} | env
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_lost_save_does_not_keep_the_process(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    process = child(
        """
        import logging, sys, jax.numpy as jnp
        from sslx.checkpoint import Checkpoints
        logging.basicConfig(format="%(message)s")
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"x": jnp.ones(3)})
        checkpoints.close()
        """,
        small_disk,
    )
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and text.count("\n") == 1 and "step 1 is lost" in text, text


def test_kill_in_the_middle_of_a_save(tmp_path, caplog):
    process = child(
        """
        import sys, jax.numpy as jnp
        from sslx.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"x": jnp.full((50_000_000,), 1.0)})
        checkpoints.wait()
        checkpoints.save(2, {"x": jnp.arange(50_000_000.0)})
        print("writing", flush=True)
        checkpoints.wait()
        """,
        tmp_path,
    )
    while not list(tmp_path.glob("2.*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert [p.name for p in tmp_path.glob("2*")] == ["2.orbax-checkpoint-tmp"], "not in the middle"
    checkpoints = Checkpoints(tmp_path)
    step, got = checkpoints.restore({"x": jax.ShapeDtypeStruct((50_000_000,), jnp.float32)})
    assert step == 1 and bool((got["x"] == 1).all())
    assert "2.orbax-checkpoint-tmp is not finished" in caplog.text
    checkpoints.save(2, got)
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    checkpoints.close()


TWO = """
    import logging, sys, jax, numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    port, me, directory = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(me), initialization_timeout=240)
    from sslx.checkpoint import Checkpoints, Retention, digest
    logging.basicConfig(format="%(message)s")
    devices = np.asarray(jax.devices()).reshape(4, 2)
    mesh = Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    place = {"x": NamedSharding(mesh, P("a", "b")), "key": NamedSharding(mesh, P())}
    draw = lambda k: {"x": jax.random.bits(k, (64, 32)).astype("float32"), "key": k}
    make = jax.jit(lambda seed: draw(jax.random.key(seed)), out_shardings=place)
    leaf = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    abstract = jax.tree.map(leaf, jax.eval_shape(make, 0), place)
    checkpoints = Checkpoints(directory, Retention(last=2))
    print(f"start {checkpoints.restore(abstract)}")  # at once: Gloo speaks between pieces
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make(step))
    checkpoints.wait()
    if me == "1":  # damage the other's share
        from pathlib import Path
        files = [f for f in Path(directory, "4", "ocdbt.process_0").rglob("d/*") if f.is_file()]
        file = max(files, key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[:-3000])
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    step, got = Checkpoints(directory).restore(abstract)
    print("restored", step, digest(got) == digest(make(3)), checkpoints.steps())
    checkpoints.close()
"""


def test_two_processes_save_and_restore_and_one_restores_theirs(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = [child(TWO, port, me, tmp_path, devices=4) for me in (0, 1)]
    try:
        out = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    for process, text in zip(both, out, strict=True):
        assert process.returncode == 0, text
        assert "start None" in text and "restored 3 True [3, 4]" in text, text
    assert "checkpoint skipped: step 4" in out[0] and "skipped" not in out[1]
    key = jax.random.key(3)
    want = {"x": jax.random.bits(key, (64, 32)).astype("float32"), "key": key}
    step, got = Checkpoints(tmp_path).restore(abstract(want))
    assert step == 3
    assert_equal(got, want)


def test_orbax_is_silent(tmp_path):
    process = child(
        """
        import sys, jax.numpy as jnp
        from sslx.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"x": jnp.ones(3)})
        checkpoints.restore({"x": jnp.ones(3)})
        checkpoints.close()
        """,
        tmp_path,
    )
    assert process.communicate(timeout=240)[0] == "" and process.returncode == 0
