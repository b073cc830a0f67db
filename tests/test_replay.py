"""A step replayed is the step that was, and says what in it is not finite first."""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from commands import TINY, rows

import sslx
from sslx.cli import main
from sslx.data.pipeline import Pipeline
from sslx.data.text.tokenize import tokenize
from sslx.data.text.tokens import Tokens
from sslx.jaxprs import first_nonfinite, first_uses
from sslx.recipes import load
from sslx.replay import layer_of, mesh_here, save


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A run whose loss is no number at step 25; step 20 is saved."""
    path = tmp_path_factory.mktemp("poisoned")
    run = ("train", TINY, "objective.poison=25", "mesh.fsdp=2", "mesh.replica=4", "--workdir", path)
    assert main([*map(str, run)]) == 3
    return path


def contents(path):
    files = [p for p in path.rglob("*") if p.is_file() and "replay" not in p.parts]
    return {str(p): p.read_bytes() for p in files}


def test_the_bad_step_is_in_the_metrics_and_replayed_by_default(poisoned, tmp_path, capfd):
    run = shutil.copytree(poisoned, tmp_path / "run")
    last = rows(run)[-1]
    assert last["step"] == 25 and last["loss"] == last["grad_norm"] == "nan"
    before = contents(run)
    assert main(["replay", str(run)]) == 0
    said = capfd.readouterr().out
    assert contents(run) == before  # nothing but RUN/replay
    folder = run / "replay" / "25"
    assert said.startswith(f"step 25, from the checkpoint of step 20; its batch is in {folder}\n")
    assert "loss nan (in the run nan)" in said and (folder / "report.txt").read_text() == said
    line = 1 + TINY.read_text().split("jnp.nan, 1.0)")[0].count("\n")
    assert f"the first NaN comes from select_n at recipe.py:{line} (loss)" in said
    for name, count in (("encoder/patch", 80), ("encoder/mlp", 272), ("pixels", 68)):
        assert any(x.split()[::3] == [name, str(count)] for x in said.splitlines() if name in x)


def test_on_resuming_the_row_of_the_bad_step_is_gone(poisoned, tmp_path):
    run = shutil.copytree(poisoned, tmp_path / "run")
    assert main(["train", str(run), "objective.poison=-1", "steps=25", "--accept-changes"]) == 0
    assert [row["step"] for row in rows(run)] == [1, 5, 10, 15, 20, 25]
    assert math.isfinite(rows(run)[-1]["loss"])


def test_a_good_step_is_what_it_was_and_its_batch_is_saved(poisoned, tmp_path):
    """From step 0, for the only checkpoint is of step 20."""
    run = sslx.Run.open(shutil.copytree(poisoned, tmp_path / "run"))
    [row] = [row for row in rows(run.path) if row["step"] == 15]
    text = (run.path / "metrics.jsonl").read_text().replace('"grad_norm"', '"other"')
    (run.path / "metrics.jsonl").write_text(text)  # of another version
    replayed = run.replay(15)
    assert replayed.begin == 0 and replayed.step == 15 and replayed.first == ()
    for name in ("loss", "grad_norm", "param_norm", "learning_rate"):
        assert replayed.metrics[name] == pytest.approx(row[name], rel=1e-6)
    assert f"loss {row['loss']:.7g} (in the run {row['loss']:.7g})\n" in str(replayed)
    assert f"grad_norm {row['grad_norm']:.7g}\n" in str(replayed)
    assert str(replayed).endswith("\nall is finite")
    assert [layer.name for layer in replayed.layers] == ["encoder/patch", "encoder/mlp", "pixels"]
    total = sum(layer.grads**2 for layer in replayed.layers) ** 0.5
    assert total == pytest.approx(row["grad_norm"], rel=1e-5)
    total = sum(layer.params**2 for layer in replayed.layers) ** 0.5  # before, not after the step
    assert total != row["param_norm"] and total == pytest.approx(row["param_norm"], rel=0.01)
    assert sum(layer.share for layer in replayed.layers) == pytest.approx(1)

    config, folder = run.config, replayed.folder
    with config.data.batches(config.seed, config.batch_size, 14) as batches:
        image = next(batches)["image"]  # [16, 8, 8, 1]
    sheet = np.asarray(PIL.Image.open(folder / "image-0000.png"))
    tiles = sheet.reshape(2, 68, 8, 68).transpose(0, 2, 1, 3).reshape(16, 68, 68)
    np.testing.assert_array_equal(tiles[:, 2:-2:8, 2:-2:8], image[..., 0])
    seen = np.asarray(PIL.Image.open(folder / "views-image-0000.png"))
    assert seen.shape == sheet.shape and not np.array_equal(seen, sheet)
    assert "dropped" in np.load(folder / "batch.npz")


MISTAKES = {
    "41": "has steps 1 to 40, and no step 41.",
    "0": "has steps 1 to 40, and no step 0.",
    "last": "last is no step: it counts from 1",
    "": "has no step whose loss, gradient or params are not finite: name the step",
}


@pytest.mark.parametrize("step", MISTAKES)
def test_steps_that_a_run_does_not_have(poisoned, tmp_path, step, capfd, monkeypatch):
    """Said without waiting for other processes: a replay is for one host."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.setenv(name, "2")
    run = shutil.copytree(poisoned, tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"nan"', "1.0"))
    assert main(["replay", str(run), *filter(None, [step])]) == 2
    assert MISTAKES[step] in capfd.readouterr().err and not (run / "replay").exists()


# ---- its parts ----


def test_text_is_saved_as_text(tmp_path):
    sentences = ["the cat sat on the mat", "a dog ate the old bone", "the sun is out"]
    (tmp_path / "text.txt").write_text("\n\n".join(sentences))
    tokenize(
        str(tmp_path / "text.txt"),
        str(tmp_path / "tokens"),
        vocabulary_size=80,
        length=16,
        workers=0,
    )
    source = Tokens(str(tmp_path / "tokens"))
    config = dataclasses.replace(load(TINY), data=Pipeline(source, source.window))
    batch = config.data.decode(source[0], np.random.default_rng(0))
    batch = {name: np.stack([x, x]) for name, x in batch.items()}
    save(tmp_path, config, batch, batch)
    first, second = (tmp_path / "tokens.txt").read_text().splitlines()
    assert first == second and first.startswith("'[CLS] the cat sat on") and "[PAD]" not in first
    np.testing.assert_array_equal(np.load(tmp_path / "batch.npz")["tokens"], batch["tokens"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt", ".npz", ""}  # no pictures
    save(tmp_path, load(TINY), batch, batch)  # of data without a tokenizer
    ids = [int(x) for x in (tmp_path / "tokens.txt").read_text().splitlines()[0].split()]
    assert ids == batch["tokens"][0][batch["segments"][0] > 0].tolist()


def test_it_runs_on_as_many_devices_as_divide_the_batch():
    assert mesh_here(load(TINY, "batch_size=12")).size == 6
    assert mesh_here(load(TINY, "batch_size=12", "accumulate=3")).size == 4
    assert mesh_here(load(TINY, "mesh.tensor=3")).size == 8  # another machine's mesh
    assert dict(mesh_here(load(TINY, "mesh.tensor=4")).shape)["tensor"] == 4


def test_layers_are_modules_and_the_layers_of_stacks():
    axes = {"net/blocks/mlp/kernel": 0, "net/blocks/norm": 0, "net/embed/bias": -1, "scale": -1}
    assert [layer_of(path, axes) for path in axes] == ["net/blocks"] * 2 + ["net/embed", "scale"]


def turns(x):
    """A NaN from the third turn on, which the fourth hands on."""

    @jax.checkpoint
    def body(x, t):
        return x - 1.0, jnp.log(x).sum()

    return jax.lax.scan(body, x, jnp.arange(4))


WHERE = {
    "a loop": (turns, 1.5, ["NaN comes from log", "(body)", "at 2 of 0 to 3"]),
    "backwards": (jax.grad(lambda x: jnp.sqrt(x) * 0.0), 0.0, ["NaN comes from mul"]),
    "overflow": (lambda x: jnp.exp(x) - jnp.exp(x), 1e3, ["infinity comes from exp", "from sub"]),
    "no branch taken": (lambda x: jnp.where(x > 0, x, jnp.nan).sum() + jnp.var(x), 1.0, []),
}


@pytest.mark.parametrize("name", WHERE)
def test_what_is_not_finite_first_is_named(name):
    function, value, words = WHERE[name]
    said = "; ".join(first_nonfinite(function, jnp.full(2, value) if value > 0 else value))
    assert all(word in said for word in words) and bool(said) == bool(words), said


def test_leaves_are_in_the_order_of_their_use():
    def loss(params, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x * w), None))
        x, _ = jax.lax.scan(layer, x + params["z"], params["stack"])
        return (x * params["a"]).sum()

    params = {"a": 1.0, "never": 1.0, "stack": jnp.ones(3), "z": 1.0}  # 0, 1, 2, 3; x is 4
    order = first_uses(jax.grad(loss), params, 1.0)
    assert [i for i in order if i < 4] == [3, 2, 0]
