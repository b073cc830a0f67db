"""A run that was stopped, killed, damaged or moved ends as the one that nothing happened to."""

import io
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from commands import PATIENCE, TINY, damage, free_port, group, rows, run, start, stop, until

from sslx.checkpoint import Checkpoints, digest, load
from sslx.cli import main
from sslx.digest import named

LOGGED = [1, 5, 10, 15, 20, 25, 30, 35, 40]
HELD_AFTER = 28  # batches: step 25 is logged, step 40 out of reach


def end(path):
    return digest(load(path / "checkpoints", 40))


def steps(path):
    return Checkpoints(path / "checkpoints").steps()


def losses(path):
    return [(row["step"], row["loss"]) for row in rows(path)]


def spans(path):
    """(first, last) of the steps of each start, by the account of time."""
    return [(x["from"], x["step"]) for x in json.loads((path / "goodput.json").read_text())]


def held(process, path):
    """Wait until a run has logged step 25 and stands still for want of data."""
    until(lambda: losses(path)[-1:] and losses(path)[-1][0] == 25 and 20 in steps(path), process)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """40 steps in one go, on one device; torch and TensorFlow stay outside."""
    path = tmp_path_factory.mktemp("whole")
    forbidden = '{"torch", "tensorflow", "transformers"} & set(sys.modules)'
    code = (
        f"import sys; from sslx.cli import main; sys.exit(main(sys.argv[1:]) or {forbidden} or 0)"
    )
    run("train", TINY, "--workdir", path, code=code)
    assert steps(path) == [20, 40] and [step for step, _ in losses(path)] == LOGGED
    return path


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The same, killed between steps 25 and 40."""
    path = tmp_path_factory.mktemp("killed")
    process = start("train", TINY, "--workdir", path, HELD_AFTER=HELD_AFTER, HELD=path)
    try:
        held(process, path)
    finally:
        stop(process)
    assert steps(path) == [20]
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "lo')  # as if the kill had cut a line
    return path


def assert_close(path, other):
    mine, theirs = (named(load(p / "checkpoints", 40)) for p in (path, other))
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        np.testing.assert_allclose(x, theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_killed_and_resumed_is_bitwise_the_run_in_one_go(whole, killed, tmp_path):
    path = shutil.copytree(killed, tmp_path / "run")
    run("train", TINY, "data.workers=2", "--workdir", path)
    assert end(path) == end(whole)
    assert losses(path) == losses(whole)
    assert spans(path) == [(0, 25), (20, 40)]  # what was killed is known up to its last row


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_resumed_on_another_mesh(whole, killed, tmp_path, mesh):
    path = shutil.copytree(killed, tmp_path / "run")
    sizes = zip(("replica", "fsdp", "tensor"), mesh, strict=True)
    assert main(["train", str(path), *(f"mesh.{axis}={size}" for axis, size in sizes)]) == 0
    assert_close(path, whole)


def test_eight_devices_reach_what_one_does(whole, eight):
    assert_close(eight, whole)


def test_no_worker_outlives_a_kill(tmp_path):
    held_at = {"HELD_AFTER": 20, "HELD": tmp_path}
    process = start("train", TINY, "data.workers=1", "--workdir", tmp_path, **held_at)
    try:
        until(lambda: losses(tmp_path), process)
        assert len(group(process)) >= 2
        process.kill()
        process.wait()
        until(lambda: not group(process), seconds=30)
    finally:
        stop(process)


# ---- signals ----


@pytest.mark.parametrize("signum, workers", [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_the_group_saves_and_ends(whole, tmp_path, signum, workers):
    path, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    args = ("train", TINY, f"data.workers={workers}", "--workdir", path)
    process = start(*args, HELD_AFTER=HELD_AFTER // (workers or 1), HELD=hold)
    try:
        held(process, path)
        os.killpg(process.pid, signum)
        hold.unlink()
        said, _ = process.communicate(timeout=PATIENCE)
        until(lambda: not group(process), seconds=20)  # multiprocessing's tracker ends a bit later
    finally:
        stop(process)
    (*_, last) = steps(path)
    assert process.returncode == 128 + signum
    assert 25 < last < 40 and "Traceback" not in said
    assert spans(path) == [(0, last)] and re.search(r"^time: 0:", said, re.MULTILINE)
    line = f"sslx: {signum.name}: saved at step {last}; the same command goes on from there.\n"
    assert said.endswith("\n" + line) or said == line
    run("train", path, "data.workers=0")
    assert end(path) == end(whole) and losses(path) == losses(whole)


# ---- damage ----


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(eight, tmp_path, how, caplog):
    path = shutil.copytree(eight, tmp_path / "run")
    damage(path / "checkpoints" / "40", cut=how == "truncated")
    assert main(["train", str(path)]) == 0
    assert "checkpoint skipped: step 40" in caplog.text
    assert end(path) == end(eight) and losses(path) == losses(eight)


# ---- several processes ----

# Trains, then gathers a few global batches as the devices saw them.
SEVERAL = """
import os, resource, sys
import jax
from sslx import gang, sharding
from sslx.cli import main
*arguments, batches = sys.argv[1:]
gang.SILENT, gang.READ = 10.0, 5.0
if limit := os.environ.get("LARGEST_FILE"):  # a disk that takes no more
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
if order := os.environ.get("ORDER"):  # of the mesh's devices, as a TPU's hosts interleave
    straight = sharding.Mesh.build

    def build(self, *args):
        mesh = straight(self, *args)
        devices = mesh.devices.ravel()[list(map(int, order))].reshape(mesh.devices.shape)
        return jax.sharding.Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)

    sharding.Mesh.build = build
code = main(arguments)
if not code:
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather
    from sslx.recipes import load
    from sslx.engine import feed
    config = load(arguments[1], *(x for x in arguments if "mesh." in x))
    with feed(config, config.mesh.build(), 17) as (stream, _):
        got = [process_allgather(next(stream)["image"], tiled=True) for _ in range(3)]
    if jax.process_index() == 0 and batches != "-":
        np.save(batches, np.stack(got))
sys.exit(code)
"""


def several(count, *args, late=0, own=lambda i: {}, **env):
    """The command as so many processes, eight devices in all; half of them `late` seconds late.
    `own` gives each of them environment of its own."""
    join = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": count}
    processes = []
    for i in range(count):
        if late and i == count // 2:
            time.sleep(late)
        mine = {"JAX_PROCESS_ID": i, **join, **env, **own(i)}
        processes.append(start(*args, devices=8 // count, code=SEVERAL, **mine))
    return processes


def ended(processes, *codes):
    """What each of the processes said; they end with these exit codes."""
    try:
        said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        stop(*processes)
    assert [process.returncode for process in processes] == [*codes], said
    return said


def test_four_processes_are_one(eight, tmp_path):
    """A tensor axis crosses from one to the next, so that all hold, and read, all rows. Half of
    them start late."""
    path, batches = tmp_path / "run", tmp_path / "batches.npy"
    four = several(4, "train", TINY, "mesh.tensor=8", "--workdir", path, batches, late=5)
    said = ended(four, 0, 0, 0, 0)
    assert "loss" in said[0]
    for text in said[1:]:  # Gloo speaks there
        assert not re.search("step|loss|WARN|sslx: (?!waiting for process 0)", text)
    assert_close(path, eight)
    from sslx.recipes import load as recipe

    config = recipe(TINY)
    with config.data.batches(config.seed, config.batch_size, 17) as stream:
        alone = np.stack([next(stream)["image"] for _ in range(3)])
    assert np.load(batches).tobytes() == alone.tobytes()


def test_corrupt_records_count_in_both_processes(tmp_path):
    """An eighth of the records is corrupt, and a tenth may be: both stop at one step, neither of
    which has met so many itself, and what each has met is named."""
    data = digits_of_which_some_are_corrupt(tmp_path)
    said = ended(
        several(2, "train", TINY, f"data={data}", "--workdir", tmp_path / "run", "-"), 2, 2
    )
    pattern = r"too many of 160 records cannot be decoded, (\d+) of the first (\d+) examples"
    counts = {tuple(map(int, re.search(pattern, text).groups())) for text in said}
    [(count, examples)] = counts  # at one step
    assert count > 16 and examples % 16 == 0
    for i in range(2):
        rows_ = (tmp_path / f"run/dropped/{i}.jsonl").read_text().splitlines()
        names = {Path(json.loads(row)["name"]).name for row in rows_}
        assert 0 < len(rows_) == len(names) and names <= {f"{i:03d}.png" for i in range(0, 160, 8)}


def digits_of_which_some_are_corrupt(tmp_path):
    """160 pictures, each eighth of them cut short, as a folder."""
    for i in range(160):
        (tmp_path / "data").mkdir(exist_ok=True)
        data = io.BytesIO()
        PIL.Image.fromarray(np.full((8, 8), i, np.uint8)).save(data, "PNG")
        whole = data.getvalue()
        (tmp_path / f"data/{i:03d}.png").write_bytes(whole if i % 8 else whole[:-30])
    return f"folder:{tmp_path}/data"


def test_lost_stuck_and_stopped_processes(eight, tmp_path):
    """One of four is killed: the others name it and end. One of two is stuck: both end, and its
    stack says where. One of two is told to stop: both save. One process goes on, to the params of a
    run to which nothing happened; devices of both stood by turns in the batch's axis."""
    path, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    env = {"HELD_AFTER": HELD_AFTER, "HELD": hold}
    command = ("train", TINY, "--workdir", path)

    four = several(4, *command, "-", **env)
    held(four[0], path)
    four[2].kill()
    said = ended(four, 42, 42, -signal.SIGKILL, 42)
    for i in (0, 1, 3):
        assert f"process 2 ({socket.gethostname()}) gave no sign of life for" in said[i]
        assert "loop" in (path / f"stacks/{i}.txt").read_text()
    assert steps(path) == [20]

    env["HELD_AFTER"] = HELD_AFTER - 20  # of the steps that are left
    two = several(2, *command, "stuck_after=25", "-", own=lambda i: env if i else {})
    said = ended(two, 42, 42)
    assert all(" s without progress; " in text and "process 1" in text for text in said)
    assert "tiny.py" in (path / "stacks/1.txt").read_text()  # where records are held
    assert "tiny.py" not in (path / "stacks/0.txt").read_text()
    assert steps(path) == [20]

    two = several(2, *command, "-", ORDER="04152637", **env)
    until(lambda: losses(path)[-1][0] == 20, two[0])  # rows after the checkpoint are removed
    held(two[0], path)
    two[1].send_signal(signal.SIGINT)  # to one host, which hands it on as SIGTERM, a notice
    time.sleep(3)
    hold.unlink()
    said = ended(two, 143, 143)
    (*_, last) = steps(path)
    assert 25 < last < 40
    assert all(f"SIGTERM: saved at step {last}" in text for text in said)
    assert main(["train", str(path)]) == 0
    assert_close(path, eight)


def test_a_disk_full_for_one_process_is_no_success(tmp_path):
    own = lambda i: {"LARGEST_FILE": 200} if i else {}  # noqa: E731
    two = several(2, "train", TINY, "steps=5", "--workdir", tmp_path, "-", own=own)
    for text in ended(two, 1, 1):
        assert "The last step could not be saved" in text
    assert steps(tmp_path) == []
