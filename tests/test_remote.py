"""A run in a bucket, against a local server that speaks S3."""

import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
import urllib.request

import jax
import numpy as np
import PIL.Image
import pytest
from commands import SSLX, TINY, free_port, start, stop, until
from etils import epath
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.compat.proto import event_pb2
from tiny import Denoiser, Patches

import sslx
from sslx import checkpoint, lock, paths
from sslx.checkpoint import CheckpointError, Checkpoints, load
from sslx.cli import main
from sslx.config import ConfigError, Eval
from sslx.lock import refuse_second, writing
from sslx.log import Log, step_rows
from sslx.paths import Remote, place

REASON = "NOT CHECKED: runs in buckets (pip install 'sslx[s3]' 'moto[s3]' flask flask-cors)"
pytest.importorskip("s3fs", reason=REASON)
pytest.importorskip("flask_cors", reason=REASON)
pytest.importorskip("moto", reason=REASON)
LOGGED = [1, 5, 10, 15, 20, 25, 30, 35, 40]


@pytest.fixture(scope="module")
def bucket():
    """A server with an empty bucket, and the environment that names it; ended with the module."""
    port = free_port()
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    bounded = ["timeout", "-s", "KILL", "900", sys.executable, "-c", code]
    server = subprocess.Popen(
        bounded, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }

    def answers():
        try:
            return make("bucket")
        except OSError:
            return False

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        paths._file_system.cache_clear()
        try:
            until(answers)
            yield place("s3://bucket")
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            paths._file_system.cache_clear()


def make(name):
    """Make a bucket."""
    url = f"{os.environ['AWS_ENDPOINT_URL']}/{name}"
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT")) as answer:
        return answer.status == 200


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.2)


def losses(run):
    return {row["step"]: row["loss"] for row in step_rows(run)}


@pytest.mark.parametrize(
    "text, error",
    [
        ("s3:/bucket/run", r"s3:/bucket/run would be a folder .* write s3://bucket/run"),
        ("foo://bucket/run", r"on gs:// or s3://"),
        ("S3://bucket/run", r"on gs:// or s3://"),
        ("s3://", r"write s3://BUCKET/RUN"),
        ("s3://bucket/../run", r"is no path in a bucket"),
    ],
)
def test_a_mistyped_place_is_refused(text, error, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=error):
        place(text)
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(TINY), "--workdir", text])
    assert re.search(error, capfd.readouterr().err) and not list(tmp_path.iterdir())


def test_names():
    assert str(place("s3://bucket//a/b/")) == "s3://bucket/a/b"
    assert place("s3://bucket") / "a" / "b.txt" == place("s3://bucket/a/b.txt")
    assert place("a:b/c").parts == ("a:b", "c") and place("~/x").is_absolute()


def test_what_is_not_installed_is_named(monkeypatch):
    there = paths.importlib.util.find_spec
    hide = lambda name: None if name in ("s3fs", "gcsfs") else there(name)  # noqa: E731
    monkeypatch.setattr(paths.importlib.util, "find_spec", hide)
    with pytest.raises(ValueError, match=r"s3fs: pip install 'sslx\[s3\]'"):
        place("s3://bucket/run")
    with pytest.raises(ValueError, match=r"gcsfs: pip install 'sslx\[gs\]'"):
        place("gs://bucket/run")


QUICK = f"from sslx import lock; lock.BEAT = 0.2; {SSLX}"


def test_killed_and_resumed(bucket, eight, quick, capfd, caplog):
    """The metrics are complete up to the checkpoint that a killed run left, and the resumed run
    ends as one that nothing happened to; while the first lives a second is refused."""
    run = bucket / "run"
    process = start("train", TINY, "--workdir", run, HELD_AFTER=28, HELD=TINY, code=QUICK)
    try:
        until(lambda: (run / "checkpoints/20/commit_success.txt").exists(), process)
        assert list(losses(run)) == LOGGED[:5]
        assert main(["train", str(TINY), "--workdir", f"{run}/"]) == 2
        assert f"is written to by process {process.pid} on " in capfd.readouterr().err
    finally:
        stop(process)  # by SIGKILL
    assert list(losses(run)) == LOGGED[:5] and (run / ".lock").exists()
    caplog.clear()
    assert main(["train", str(run)]) == 0
    assert f"whether process {process.pid} on" in caplog.text
    assert list(losses(run)) == LOGGED and not (run / ".lock").exists()
    np.testing.assert_allclose(list(losses(run).values()), list(losses(eight).values()), rtol=1e-4)
    mine, theirs = load(run / "checkpoints"), load(eight / "checkpoints")
    assert set(mine) == set(theirs)
    for part in ("encoder", "pixels"):
        jax.tree.map(close, mine["params"][part], theirs["params"][part])
    assert main(["train", str(run)]) == 0 and "is complete" in capfd.readouterr().err
    assert main(["show", str(run)]) == 0 and "batch_size = 16" in capfd.readouterr().out
    loader = event_file_loader.RawEventFileLoader
    tags = set()
    for file in (path for path in run.iterdir() if "tfevents" in path.name):
        (copy := eight / "copy").write_bytes(file.read_bytes())
        events = [event_pb2.Event.FromString(text) for text in loader(str(copy)).Load()]
        tags |= {(event.step, value.tag) for event in events for value in event.summary.value}
    assert {(step, "loss") for step in LOGGED} <= tags


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Square(Eval):
    """A number and a picture."""

    def __call__(self, trained):
        yield "size", float(sum(x.size for x in jax.tree.leaves(trained.params)))
        yield "square", np.full((9, 9, 1), 255, np.uint8)


def test_a_config_of_python_is_trained_and_evaluated(bucket, tmp_path, capfd):
    """Pictures, scores and pickles among the files of a run."""
    data = sslx.Pipeline(sslx.arrays(image=np.ones((32, 8, 8, 1), np.float32)))
    objective, adamw = Denoiser(Patches(8, 4)), sslx.AdamW(sslx.Constant(1e-3))
    config = sslx.Config(objective, data, adamw, steps=2, batch_size=8, evals={"shown": Square()})
    trained = sslx.fit(config, f"{bucket}/fit")
    assert trained.path == bucket / "fit" and trained.metrics()["step"].tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="was started with another recipe"):
        sslx.fit(dataclasses.replace(config, batch_size=16), f"{bucket}/fit")
    capfd.readouterr()
    assert main(["eval", f"{bucket}/fit"]) == 0
    assert f"pictures are in {bucket}/fit/pictures" in capfd.readouterr().out
    picture = (bucket / "fit" / "pictures" / "square-000002.png").read_bytes()
    assert PIL.Image.open(io.BytesIO(picture)).size == (9, 9)
    scores = sslx.Run.open(f"{bucket}/fit").scores()
    assert scores["random init"]["size"] == scores["step 2"]["size"] > 0
    assert main(["export", f"{bucket}/fit", str(tmp_path / "out")]) == 2  # it is no transformer
    assert "Patches" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", f"{bucket}/fit", f"{bucket}/out"])
    assert "must be on this machine" in capfd.readouterr().err


def test_a_bucket_that_is_not_there_is_refused(bucket, capfd):
    assert main(["train", str(TINY), "--workdir", "s3://nobody/run"]) == 2
    said = capfd.readouterr().err
    assert (
        "Cannot write to s3://nobody/run: is there such a bucket" in said and "\n" not in said[:-1]
    )
    assert main(["eval", "s3://nobody/run"]) == 2
    assert "s3://nobody/run is no run" in capfd.readouterr().err


def test_metrics_survive_a_store_that_is_out_of_reach(bucket, monkeypatch, caplog):
    """Rows wait in memory, and are said to; large objects are not written again and again."""
    monkeypatch.setattr("sslx.log.BLOCK", 200)
    run = place("s3://later/run")
    make("later")
    rows = Log(run, steps=40)
    write, sizes = Remote.write_bytes, []

    def counted(path, data):
        sizes.append(len(data))
        write(path, data)

    def broken(path, data):
        raise OSError("out of reach")

    for step in range(20):
        monkeypatch.setattr(Remote, "write_bytes", broken if 5 <= step < 9 else counted)
        rows.write(step, {"loss": step / 2})
        rows.keep(step)
        assert len(list(step_rows(run))) == (5 if 5 <= step < 9 else step + 1)
    assert caplog.text.count("metrics from step 5 on are not written yet (out of reach)") == 1
    rows.close()
    assert max(sizes[:-1]) < 200 + 5 * 200 and (run / "metrics.jsonl.0001").exists()
    assert [(row["step"], row["loss"]) for row in step_rows(run)] == [(s, s / 2) for s in range(20)]
    Log(run, steps=40, start=3).close()  # as a run that resumes from step 3
    assert [row["step"] for row in step_rows(run)] == [0, 1, 2, 3]
    assert not (run / "metrics.jsonl.0001").exists()


def test_a_checkpoint_that_cannot_be_written_is_lost_and_the_next_is_not(
    bucket, caplog, monkeypatch
):
    state = {"w": jax.numpy.arange(4.0)}
    monkeypatch.setattr(checkpoint, "RETRIES", 1)
    for path in (bucket / "saved", epath.Path(f"{bucket}/saved")):
        assert not path.exists()  # both keep the address of their first use
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")  # nobody listens there
        checkpoints = Checkpoints(bucket / "saved")
        checkpoints.save(1, state)
        checkpoints.wait()
    assert "checkpoint of step 1 is lost" in caplog.text and checkpoints.good() == []
    checkpoints.save(2, state)
    checkpoints.wait()
    assert checkpoints.good() == [2]
    (checkpoints.directory / "2/w/c/0").unlink()  # one shard
    name = "_CHECKPOINT_METADATA"  # all that is there of another after a kill before the commit
    (checkpoints.directory / "3" / name).write_bytes(
        (checkpoints.directory / "2" / name).read_bytes()
    )
    checkpoints.close()
    with pytest.raises(CheckpointError, match=r"no checkpoint in s3://bucket/saved .*:\s+step 2: "):
        load(checkpoints.directory)
    again = Checkpoints(checkpoints.directory)
    again.save(2, state)  # what is damaged is overwritten
    again.close()
    assert load(again.directory)["w"].tolist() == [0, 1, 2, 3]
    assert [path.name for path in again.directory.iterdir()] == ["2"]


def test_one_writer(bucket, quick):
    run = bucket / "locked"
    with writing(run):
        refused = pytest.raises(ConfigError, match=rf"is written to by process {os.getpid()} on")
        with refused:
            writing(run).__enter__()
        with writing(run, force=True):  # the first sees that, and leaves the object alone
            owner = (run / ".lock").read_bytes()
            until(lambda: (run / ".lock").read_bytes() != owner, seconds=20)
            with refused:
                refuse_second(run)
    assert not (run / ".lock").exists()
    (run / ".lock").write_bytes(b"{")  # is no writer
    with writing(run):
        pass
