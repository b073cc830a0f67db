"""Each command of `sslx`, as a user types it."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import REPO, TINY, rows

from sslx.checkpoint import Checkpoints, digest, load
from sslx.cli import main
from sslx.log import add_scores


def sslx(*args) -> int:
    return main([*map(str, args)])


def steps(path):
    return Checkpoints(path / "checkpoints").steps()


def said(capfd) -> str:
    out, err = capfd.readouterr()
    return " ".join((out + err).split())


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A run with probes, in the directory that `sslx train` takes by default."""
    path = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert sslx("train", TINY, "probes=True", "--traceback", "steps=20") == 0
    return path / "runs" / "tiny"


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    """A run of MAE, with a score that nothing measured."""
    path = tmp_path_factory.mktemp("mae")
    with contextlib.redirect_stderr(io.StringIO()) as text:
        assert sslx("train", TINY, "mae=True", "steps=20", "--workdir", path) == 0
    assert text.getvalue().count("attention of 5 tokens, 2 heads of 8, float32: plain, ") == 1
    add_scores(path, {"step 20": {"knn/top1": 0.78125}})
    return path


# ---- train ----


def test_a_run_directory_holds_all_that_a_run_is(probed):
    names = {path.name for path in probed.iterdir()}
    assert names >= {"recipe.py", "overrides.json", "config.txt", "metrics.jsonl", "evals.json"}
    assert json.loads((probed / "overrides.json").read_text()) == ["probes=True", "steps=20"]
    assert "\nobjective.encoder.width = 16\n" in (probed / "config.txt").read_text()
    scores = json.loads((probed / "evals.json").read_text())
    assert list(scores) == ["random init", "step 20"]
    assert scores["random init"].keys() == scores["step 20"].keys() > {"knn/top1"}
    trained = [row for row in rows(probed) if "loss" in row]
    assert [row["step"] for row in trained] == [1, 5, 10, 15, 20]
    assert all(0 <= row["data/waited"] <= 1 and row["examples_per_s"] > 0 for row in trained)


def test_tensorboard_reads_what_was_written(probed):
    events = [event for file in probed.glob("events.*") for event in read_events(file)]
    assert [e.step for e in events if e.HasField("session_log")] == [0]
    of_loss = [(e.step, v) for e in events for v in e.summary.value if v.tag == "loss"]
    trained = [(row["step"], row["loss"]) for row in rows(probed) if "loss" in row]
    assert [(step, np.float32(v.simple_value)) for step, v in of_loss] == [
        (step, np.float32(loss)) for step, loss in trained
    ]


def read_events(path):
    """The records of a TensorBoard file: length, its checksum, data, its checksum."""
    from tensorboard.compat.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_a_finished_run_is_complete_and_stays_as_it_is(eight, tmp_path, capfd):
    run = shutil.copytree(eight, tmp_path / "run")
    assert sslx("train", TINY, "--workdir", run) == 0
    assert f"{run} is complete: 40 of 40 steps." in said(capfd)
    assert rows(run) == rows(eight) and steps(run) == [20, 40]


def test_changes_are_refused_until_accepted(eight, tmp_path, capfd):
    run = shutil.copytree(eight, tmp_path / "run")
    assert sslx("train", run, "steps=45", "optimizer.b2=0.9") == 2
    text = capfd.readouterr().err
    assert "  - steps = 40\n  + steps = 45\n" in text and "+ optimizer.b2 = 0.9" in text
    assert len(re.findall("^  [-+]", text, re.MULTILINE)) == 4
    assert steps(run) == [20, 40] and json.loads((run / "overrides.json").read_text()) == []
    assert sslx("train", run, "steps=45", "--accept-changes") == 0
    assert steps(run) == [20, 40, 45] and rows(run)[-1]["step"] == 45
    assert json.loads((run / "overrides.json").read_text()) == ["steps=45"]
    assert sslx("train", run) == 0
    assert f"{run} is complete: 45 of 45 steps." in said(capfd)


def test_how_a_run_is_executed_may_change(eight, tmp_path):
    run = shutil.copytree(eight, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "40")
    how = ("mesh.tensor=2", "log_every=4", "save_every=10", "data.workers=0", "probes=True")
    assert sslx("train", TINY, "--workdir", run, *how, "keep.last=5") == 0
    assert steps(run) == [20, 30, 40]
    trained = [row["step"] for row in rows(run) if "loss" in row]
    assert trained == [1, 5, 10, 15, 20, 24, 28, 32, 36, 40]
    scores = json.loads((run / "evals.json").read_text())
    assert list(scores) == ["random init", "step 20", "step 40"]


# ---- eval ----


def test_eval_is_a_table_of_trained_random_and_pixels(probed, tmp_path, capfd):
    run = shutil.copytree(probed, tmp_path / "run")
    before = json.loads((run / "evals.json").read_text())
    assert sslx("eval", run) == 0
    table = capfd.readouterr().out
    for word in ("step 20", "random init", "pixels", "knn/top1", "health/rankme"):
        assert word in table
    scores = json.loads((run / "evals.json").read_text())
    assert list(scores) == ["random init", "step 20", "pixels"]
    for name in before:
        assert scores[name] == pytest.approx(before[name], rel=1e-5)
    assert scores["pixels"]["knn/top1"] > 0.9
    line = re.sub(r"[^\w./]+", " ", next(x for x in table.splitlines() if "knn/top1" in x)).split()
    want = [f"{scores[n]['knn/top1']:.4g}" for n in ("step 20", "random init", "pixels")]
    assert line == ["knn/top1", *want]


def test_eval_on_other_data_with_one_probe_at_a_step(eight, tmp_path, capfd):
    run = shutil.copytree(eight, tmp_path / "run")
    sets = ("digits:test", "digits:train")
    assert sslx("eval", run, "--data", *sets, "--on", "knn", "--step", 20) == 0
    assert "knn/top1" in said(capfd)
    (run / "evals.json").write_text(
        json.dumps(json.loads((run / "evals.json").read_text()) | {"step 40": {"knn/top1": 1.0}})
    )
    assert sslx("eval", run, "--data", *sets, "--on", "knn,health", "--step", 20) == 0
    scores = json.loads((run / "evals.json").read_text())
    where = " on digits:test digits:train"
    assert set(scores) == {f"step 20{where}", f"random init{where}", f"pixels{where}", "step 40"}
    assert scores[f"step 20{where}"].keys() > {"knn/top1", "health/rankme"}
    assert "linear/top1" not in scores[f"step 20{where}"]


def test_the_number_of_neighbors_is_set_on_the_command_line(probed, tmp_path, capfd):
    run = shutil.copytree(probed, tmp_path / "run")
    assert sslx("eval", run, "--on", "knn", "evals.probes.on.0.k=5000") == 2
    text = said(capfd)
    assert "needs 5000 neighbors" in text and "on the command line evals.probes.on.0.k=1437" in text
    assert sslx("eval", run, "evals.probes.on.0.k=3", "--on", "knn") == 0
    assert "step 20 with evals.probes.on.0.k=3" in json.loads((run / "evals.json").read_text())
    assert sslx("eval", run, "steps=3") == 2
    assert "'steps=3': an evaluation takes evals.a=value." in said(capfd)


# ---- show ----


def block_flops(n, D):
    """qkv and projection, two layers of the MLP, scores and their use."""
    return 2 * n * (4 * D * D + 2 * 4 * D * D) + 2 * 2 * n * n * D


def mae_flops(F, N, K, encoder, decoder):
    """A forward pass: F values of a patch, N patches, K kept ones, (width, depth) twice."""
    (D, depth), (d, blocks) = encoder, decoder
    ends = 2 * K * F * D + 2 * (K + 1) * D * d + 2 * (N - K) * d * F
    return ends + depth * block_flops(K + 1, D) + blocks * block_flops(N + 1, d)


def shown_flops(text):
    found = re.search(r"rematerialization included: (\S+) G", text)
    return float(found[1]) * 1e9


def test_show_counts_flops_of_mae(capfd):
    assert sslx("show", TINY, "mae=True", "data=digits:") == 0
    text = said(capfd)
    assert "objective.encoder.width = 16" in text and "mesh.fsdp = None" in text
    want = 3 * mae_flops(4, 16, 4, (16, 1), (16, 1)) - 2 * 4 * 4 * 16  # pixels have no gradient
    for tokens in (5, 17):
        assert f"attention of {tokens} tokens, 2 heads of 8, float32: plain, " in text
    crop, scores = 2 * 2 * 8**3, 4 * (5**2 + 17**2) * 16  # scores are computed twice
    assert 0 <= shown_flops(text) - want <= (crop + scores) * 1.01


def test_show_needs_no_data(capfd):
    recipe = REPO / "configs" / "mae_vit_imagenet.py"
    assert sslx("show", recipe, "variant=B") == 0
    text = said(capfd)
    assert "data.source = 'tfds:imagenet2012:train'" in text
    assert "encoder/transformer/blocks/mlp/down/kernel" in text and "fsdp" in text
    assert "params 111,6" in text and "{'replica': 1, 'fsdp': 8, 'tensor': 1}" in text
    forward = mae_flops(768, 196, 49, (768, 12), (512, 8))
    assert 3 * forward < shown_flops(text) < 4 * forward


def test_show_of_a_run(eight, capfd):
    assert sslx("show", eight, "batch_size=8") == 0
    text = said(capfd)
    assert "batch_size = 8" in text and "params/encoder" not in text and "steps = 40" in text


# ---- export and import ----


def test_what_is_exported_is_imported_and_goes_on(mae, tmp_path, capfd):
    out, run = tmp_path / "out", tmp_path / "run"
    assert sslx("export", mae, out) == 0
    assert f"{out}: step 20 of {mae}, for hf" in said(capfd)
    config = json.loads((out / "config.json").read_text())
    assert config["image_size"] == 8 and config["patch_size"] == 2
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.3], [0.37])
    kinds = ("config.json", "model.safetensors")
    assert len({(out / name).stat().st_mode for name in kinds}) == 1  # others may read both
    card = (out / "README.md").read_text()
    assert "step 20" in card and "| knn/top1 | 0.78125 |" in card and "batch_size = 16" in card

    other = ("--recipe", TINY, "mae=True", "steps=5", "objective.encoder.width=8")
    assert sslx("import", out, run, *other) == 2 and not run.exists()
    assert f"[16, 16] in {out} and [8, 16] in this run" in said(capfd)
    assert sslx("import", out, run) == 2 and not run.exists()
    text = said(capfd)
    assert f"mae_vit_imagenet: the model of {out} reads pictures of num_channels=1, and" in text
    assert "a recipe whose data are like those of the checkpoint, --recipe RECIPE" in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "steps", lambda checkpoints: [])
        assert sslx("import", out, run, "--recipe", TINY, "mae=True", "steps=5") == 1
    assert f"{run} could not be written: make room" in said(capfd)
    assert not [path for path in tmp_path.iterdir() if path != out]  # and it can be tried again
    assert sslx("import", out, run, "--recipe", TINY, "mae=True", "steps=5") == 0
    trained, imported = load(mae / "checkpoints"), load(run / "checkpoints")
    assert digest(imported["params"]) == digest(trained["params"]) and imported["step"] == 0
    assert sslx("import", out, run, "--recipe", TINY, "mae=True") == 2
    assert f"{run} is a run already" in said(capfd)
    assert sslx("train", run) == 0
    assert steps(run) == [0, 5]
    first = next(row["loss"] for row in rows(run) if "loss" in row)
    assert first < 0.9 < next(row["loss"] for row in rows(mae) if "loss" in row)


def test_export_for_timm(mae, tmp_path):
    from safetensors.numpy import load_file

    assert sslx("export", mae, tmp_path / "vit.safetensors", "--format", "timm") == 0
    arrays = load_file(tmp_path / "vit.safetensors")
    assert arrays["pos_embed"].shape == (1, 17, 16) and "blocks.0.attn.qkv.weight" in arrays
    run = shutil.copytree(mae, tmp_path / "run")
    of_three_devices = ["mae=True", "steps=20", "mesh.tensor=3"]
    (run / "overrides.json").write_text(json.dumps(of_three_devices))
    assert sslx("export", run, tmp_path / "out", "--format", "timm") == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


# ---- the command itself ----


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    from sslx.cli import parser

    monkeypatch.setenv("HOME", str(tmp_path))
    commands = [("train", "x", "--workdir=~/run"), ("eval", "~/run"), ("export", "~/run", "~/run")]
    commands += [("import", "~/run", "~/run", "--recipe=~/run"), ("show", "~/run")]
    commands += [("replay", "~/run", "3")]
    commands += [("tokenize", "~/run", "~/run", "--tokenizer=~/run")]
    for command in commands:
        arguments = vars(parser().parse_args(command))
        paths = [str(value) for value in arguments.values() if "run" in str(value).split("/")]
        assert paths == [f"{tmp_path}/run"] * sum("~" in word for word in command), command


@pytest.mark.parametrize("command", ["train", "eval", "replay", "export", "show"])
def test_help_says_that_a_recipe_is_executed(command, capfd):
    with pytest.raises(SystemExit):
        sslx(command, "--help")
    assert "is Python code that this executes: open runs that you trust." in said(capfd)


@pytest.mark.parametrize("command", ["export", "import", "show"])
def test_a_command_for_one_host_waits_for_no_other(command, mae, tmp_path, monkeypatch, capfd):
    import jax

    def joined(*args, **options):
        raise AssertionError("it joins the other hosts")

    monkeypatch.setattr(jax.distributed, "initialize", joined)
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "2")
    paths = {"export": (mae, tmp_path / "out"), "import": (tmp_path, tmp_path / "run")}
    assert sslx(command, *paths.get(command, (mae,))) == 2 * (command == "import")
    assert "config.json" in said(capfd) or command != "import"  # that is missing


def test_the_command_starts_fast_and_explains_itself():
    code = """
import sys
from sslx.cli import main
try:
    main(["--help"])
except SystemExit as done:
    heavy = {"jax", "flax", "numpy", "grain", "orbax", "rich"} & set(sys.modules)
    sys.exit(done.code or heavy or 0)
"""
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("train", "eval", "replay", "export", "import", "show"):
        assert f"    {command} " in done.stdout
    assert "name=value fills an argument" in done.stdout


@pytest.mark.parametrize(
    "args", [("train",), ("train", TINY, "--steps", "3"), ("export", "x", "y", "z=1")]
)
def test_unknown_arguments(args, capfd):
    with pytest.raises(SystemExit) as ended:
        sslx(*args)
    error = capfd.readouterr().err
    assert ended.value.code == 2 and "sslx" in error
    assert ("an override has no dashes, name=value" in error) == ("--steps" in args)


def test_traceback_on_request(tmp_path, capfd):
    assert sslx("train", TINY, "stepz=3", "--workdir", tmp_path, "--traceback") == 2
    said = capfd.readouterr().err
    assert "Traceback" in said and "ConfigError" in said and "did you mean 'steps'" in said
