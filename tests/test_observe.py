"""What a run says of itself: where its time went, how near the peak, what it ran on."""

import contextlib
import importlib.metadata
import io
import json
import math
import os
import re
import shutil
import subprocess
import time
from concurrent.futures import Future
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import REPO, TINY, rows

from sslx import chips, cli
from sslx.checkpoint import Checkpoints
from sslx.config import ConfigError
from sslx.environment import commit
from sslx.gang import Gang
from sslx.goodput import AGAIN, KINDS, Account, Clock, Compilations, shares, summed
from sslx.log import Log
from sslx.recipes import load
from sslx.watch import Profile, Watch


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves."""
    moment = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: moment[0])
    return moment


def slowly(now, seconds: float):
    for i in range(100):
        now[0] += seconds
        yield i


# ---- time ----


def test_each_second_is_of_one_kind(now):
    clock = Clock(began=60.0)  # a program that began 40 seconds ago
    with clock.spending("step"):
        now[0] += 3.0
        clock.wait(slowly(now, 0.5))
        with contextlib.suppress(OSError), clock.spending("checkpoint_save"):
            now[0] += 2.0
            with clock.spending("evaluation"):
                now[0] += 7.0
            raise OSError("a full disk")
        now[0] += 11.0
        clock.move(10.0, "compile")  # reported once it has passed
    now[0] += 1.0
    spent = {"initialization": 41, "step": 4, "data_loading": 0.5, "checkpoint_save": 2}
    spent |= {"evaluation": 7, "compile": 10, "checkpoint_restore": 0}
    assert clock.totals() == pytest.approx(spent) and set(spent) == set(KINDS)


def test_clock_reads_rates_since_the_last_reading(now):
    clock = Clock()
    batches = slowly(now, 0.5)
    for expected in range(4):
        assert clock.wait(batches) == expected  # half a second waited
        now[0] += 1.5  # and one and a half worked
    assert clock.read(4) == pytest.approx((4 / 8, 0.25))
    now[0] += 2.0
    assert clock.read(1) == pytest.approx((0.5, 0.0))  # both start anew
    clock.wait(batches)
    assert clock.read(1) == pytest.approx((2.0, 1.0))


def test_clock_counts_a_wait_that_fails(now):
    clock = Clock()

    def broken():
        now[0] += 3.0
        raise OSError("gone")
        yield

    with pytest.raises(OSError, match="gone"):
        clock.wait(broken())
    now[0] += 1.0
    assert clock.read(0) == pytest.approx((0.0, 0.75))


def test_clock_read_twice_at_once_is_finite(now):
    clock = Clock()
    assert np.isfinite(clock.read(0)).all()


def start(first: int, last: int, seconds: float) -> dict:
    """A start of a run with so many seconds of steps, and one of anything else."""
    return {"from": first, "step": last, "seconds": dict.fromkeys(KINDS, 1.0) | {"step": seconds}}


def test_steps_that_were_lost_are_computed_again():
    """30 steps of 2 s, of which the last 10 are lost; 30 of 3 s, of which 15; and 5 of 4 s."""
    total = summed([start(0, 30, 60), start(20, 50, 90), start(35, 40, 20)])
    assert total[AGAIN] == pytest.approx(10 * 2 + 15 * 3)
    assert total["step"] == pytest.approx(60 + 90 + 20 - 65) and total["compile"] == 3
    # The newest two checkpoints were damaged: the third start goes back before both others.
    total = summed([start(0, 30, 60), start(20, 50, 90), start(10, 10, 0)])
    assert total[AGAIN] == pytest.approx(20 * 2 + 90)
    assert summed([start(0, 0, 0)])[AGAIN] == 0


def test_shares_are_said_largest_first():
    seconds = dict.fromkeys(KINDS, 0.0) | {"step": 3276, "compile": 360, "data_loading": 15}
    assert shares(seconds | {AGAIN: 90}) == (
        "1:02:21, 88% steps, 10% compile, 2% steps computed again"
    )


@pytest.mark.parametrize("text", ["", "{}", "[3]", '[{"from": 0, "step": 3, "seconds": {}}]'])
def test_an_account_that_cannot_be_read_is_put_aside(tmp_path, text, caplog):
    (tmp_path / "goodput.json").write_text(text)
    log = Log(tmp_path, 10)
    account = Account(log, Clock(), 0)
    account.close()
    log.close()
    assert account.earlier == [] and f"{tmp_path}/goodput.json is damaged" in caplog.text
    assert (tmp_path / "goodput.damaged.json").read_text() == text
    assert len(json.loads((tmp_path / "goodput.json").read_text())) == 1


# ---- compilations ----


def test_a_step_that_is_compiled_again_is_said(tmp_path, caplog, capsys):
    def train_step(x):
        return jnp.sin(x) + 1

    log, clock, step = Log(tmp_path, 10), Clock(), jax.jit(train_step)
    with clock.spending("step"), Compilations(log, clock) as compilations:
        before = clock.totals()["compile"]
        step(np.float32(1))
        step(np.float32(2))
        jax.jit(lambda x: x * 3)(np.float32(1))
        assert compilations.count["train_step"] == 1 and caplog.text == ""
        assert 0 < clock.totals()["compile"] - before < sum(clock.totals().values())
        step(np.ones(3, np.float32))
    step(np.ones(4, np.float32))  # heard no more
    log.close()
    assert compilations.count["train_step"] == 2
    assert len(re.findall(r"the step is compiled: \d+\.\d s", capsys.readouterr().err)) == 1
    assert "the step was compiled again" in caplog.text


def test_compilations_are_kept_in_the_user_s_cache(tmp_path, monkeypatch):
    """On a CPU too; a place that was named, or one that cannot be written, is left alone."""
    before = jax.config.jax_compilation_cache_dir
    assert before == os.environ["JAX_COMPILATION_CACHE_DIR"]
    try:
        cli.start_jax()
        assert jax.config.jax_compilation_cache_dir == before
        (tmp_path / "file").touch()
        jax.config.update("jax_compilation_cache_dir", None)
        for cache, kept in [("file", None), ("cache", str(tmp_path / "cache" / "sslx"))]:
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
            cli.start_jax()
            assert jax.config.jax_compilation_cache_dir == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# ---- a run ----

PEAK = 1e9  # floating-point operations a second of a device, in the run below


def trained(path, *overrides) -> str:
    """What `sslx train` says; every step is in the cache once it was compiled."""
    said, before = io.StringIO(), jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            chip = replace(chips.CHIPS["H100"], kind="cpu", peak=PEAK)
            patch.setitem(chips.CHIPS, "cpu", chip)
            words = ("train", str(TINY), "steps=8", "log_every=2", "save_every=4", *overrides)
            assert cli.main([*words, "--workdir", str(path)]) == 0
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    return said.getvalue()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run, what it said, and the seconds that it took."""
    path, began = tmp_path_factory.mktemp("watched"), time.perf_counter()
    said = trained(path, "profile=3:4")
    return path, said, time.perf_counter() - began


def starts(path) -> list[dict]:
    return json.loads((path / "goodput.json").read_text())


def test_rows_say_the_share_of_the_peak(watched):
    """By hand: three layers on 16 patches of each of 16 images, forward, and backward for kernels
    and inputs, but for the first layer's, whose inputs are data; and a crop's two products."""
    path, said, _ = watched
    layers = [2 * 16 * 16 * inputs * outputs for inputs, outputs in ((4, 16), (16, 16), (16, 4))]
    flops = 3 * sum(layers) - layers[0] + 2 * 2 * 16 * 8**3
    written = [row for row in rows(path) if "loss" in row]
    assert [row["step"] for row in written] == [1, 2, 4, 6, 8]
    for row in written:
        rate = row["examples_per_s"] / 16
        assert row["share_of_peak"] == pytest.approx(flops * rate / (8 * PEAK))
    assert re.search(r"step 8/8  loss .* examples/s  waited \d+%  \d+% of peak", said)


def test_all_time_is_accounted_for(watched):
    path, said, wall = watched
    [own] = starts(path)
    assert (own["from"], own["step"]) == (0, 8) and set(own["seconds"]) == set(KINDS)
    total = sum(own["seconds"].values())
    assert 0.6 * wall < total < wall  # what is left is before the clock and after it
    assert own["seconds"]["compile"] > 0 and own["seconds"]["checkpoint_save"] > 0
    row = rows(path)[-1]
    for kind, seconds in own["seconds"].items():  # the row is from before the last save
        assert 0 <= row[f"seconds/{kind}"] <= seconds + 1e-3
    stalls = [row["checkpoint/stalled_s"] for row in rows(path)]
    assert stalls[3] > 0 and stalls == [0, 0, 0, stalls[3], 0]  # saved between steps 4 and 6
    assert stalls[3] == pytest.approx(row["seconds/checkpoint_save"], abs=2e-3)
    assert re.search(r"\ntime: 0:\d\d:\d\d, \d+% \w+", said) and "starts" not in said


def test_a_profile_opens_and_has_its_steps(watched):
    path, said, _ = watched
    assert f"profile of steps 3 to 4: xprof --logdir {path}" in said
    [file] = path.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = {dict(event.stats)["step_num"] for event in events if event.name == "train"}
    assert steps == {3, 4}


def test_a_second_start_finds_the_step_in_the_cache_and_counts_what_it_computes_again(
    watched, tmp_path
):
    first, said, _ = watched
    assert said.count("the step is compiled: ") == 1 and "compiled again" not in said
    path = shutil.copytree(first, tmp_path / "run")
    shutil.rmtree(path / "checkpoints" / "8")
    (path / "plugins").rename(tmp_path / "plugins")
    said = trained(path, "profile=3:4")
    cache = jax.config.jax_compilation_cache_dir
    found = rf"the step is compiled: \d+\.\d s, from the cache in {cache}\n"
    assert len(re.findall(found, said)) == 1
    assert "no step of profile=3:4 is left" in said and not (path / "plugins").exists()
    one, two = starts(path)
    assert [one] == starts(first) and (two["from"], two["step"]) == (4, 8)
    lost = one["seconds"]["step"] / 2
    row = rows(path)[-1]
    assert row[f"seconds/{AGAIN}"] == pytest.approx(lost, abs=1e-3)
    assert row["seconds/step"] <= one["seconds"]["step"] - lost + two["seconds"]["step"] + 1e-3
    assert re.search(r"\ntime: 0:.*; over 2 starts: 0:", said)
    assert len(json.loads((path / "environment.json").read_text())) == 2


def test_a_profile_ends_with_its_run(tmp_path, capsys):
    log = Log(tmp_path, 10)
    with contextlib.suppress(KeyboardInterrupt), Profile(log, "3:9", 0) as profile:
        for step in range(1, 5):
            profile.begin(step)
            assert not profile.end(step - 1)
        raise KeyboardInterrupt
    log.close()
    assert "profile of steps 3 to 4: " in capsys.readouterr().err
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize("profile", ["5", "5:4", "0:3", "a:b", "3:-4", "3:4:5", "", "3:1001"])
def test_a_profile_of_no_steps_is_refused(profile):
    config = load(TINY, "steps=1000")
    assert replace(config, profile="3:1000") == config  # it says how, not what
    message = "step 1001 is after the last, 1000" if profile == "3:1001" else "as 100:105"
    with pytest.raises(ConfigError, match=message):
        load(TINY, "steps=1000", f"profile={profile}")


# ---- environment ----


def test_a_run_says_by_what_it_was_computed(watched):
    [start] = json.loads((watched[0] / "environment.json").read_text())
    versions = start["versions"]
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"):
        assert versions[name] == importlib.metadata.version(name)
    assert (start["devices"], start["device_kind"], start["processes"]) == (8, "cpu", 1)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
    for name in ("sslx", "recipe"):  # of tests/, in the same repository
        known = start["commits"][name]
        assert known is None if head.returncode else known.startswith(head.stdout.strip())
    assert not [text for text in os.environ.values() if len(text) > 30 and text in str(start)]


def test_commits_are_those_of_the_files(tmp_path, monkeypatch):
    def git(*words):
        words = ("-c", "user.name=a", "-c", "user.email=a@b", *words)
        return subprocess.check_output(["git", *words], cwd=tmp_path, text=True).strip()

    assert commit(tmp_path) is None and commit("") is None
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "b.py").write_text("2")
    assert commit(tmp_path / "recipes") == git("rev-parse", "HEAD")
    assert commit(tmp_path / "site-packages") is None  # installed within someone's repository
    (tmp_path / "recipes" / "a.py").write_text("3")
    assert commit(tmp_path / "recipes") == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path / "recipes") is None


# ---- the bar ----


def test_the_bar_shows_speed_and_loss_of_now(tmp_path, now, monkeypatch):
    shown, config, log = [], load(TINY, "batch_size=10", "log_every=100"), Log(tmp_path, 1000)
    monkeypatch.setattr(log, "progress", lambda step, text="", line=False: shown.append(text))
    peak = Future()
    peak.set_result(math.nan)
    account, gang = Account(log, Clock(), 0), Gang(tmp_path, 60.0)
    watch = Watch(config, log, Checkpoints(tmp_path), account, gang, peak)
    sound = {"grad_norm": jnp.float32(1), "param_norm": jnp.float32(1), "dropped": jnp.zeros(1)}
    for step in range(1, 6):
        now[0] += 2.0
        watch.see(step, {"loss": jnp.float32(step), **sound}, {})
    assert [text.split("  ")[:2] for text in shown[1:]] == [
        [f"loss {step}.0000", "5 examples/s"] for step in range(2, 6)
    ]
    now[0] += 100.0  # an evaluation
    watch.restart()
    now[0] += 1.0
    watch.see(6, {"loss": jnp.float32(6), **sound}, {})
    assert shown[-1].startswith("loss 6.0000  10 examples/s")
    log.close()
