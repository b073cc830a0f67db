"""A run as a Python value: fitted, opened, probed and exported, from arrays of any kind."""

import dataclasses
import re

import commands
import numpy as np
import pytest
from commands import REPO

import sslx
from sslx.cli import main

# A method that sslx has never heard of, as a notebook would hold it.
SPECTRUM = '''
from dataclasses import dataclass

import jax, jax.numpy as jnp, numpy as np
import sslx
from sslx.data.formats.arrays import arrays
from sslx.evals import KNN
from sslx.models.encoder import Encoder, Signature


def encode(variables, spectrum):
    return jnp.tanh(spectrum @ variables["w"])[:, None]  # one token [B, 1, D]


@dataclass(frozen=True)
class Autoencode(sslx.Objective):
    """Reconstruct a spectrum from a few numbers."""

    width: int = 8

    def init(self, key, batch):
        size = batch["spectrum"].shape[1]
        w, v = (jax.random.normal(k, (size, self.width)) / size**0.5 for k in jax.random.split(key))
        return {"w": w, "v": v.T}, {}

    def loss(self, params, buffers, batch, key, step):
        x = batch["spectrum"]
        error = jnp.square(encode(params, x)[:, 0] @ params["v"] - x)
        return error.mean(), (buffers, {})

    def encoders(self, params, buffers):
        return {"spectra": Encoder({"w": params["w"]}, encode, Signature(("spectrum",)))}


rng = np.random.default_rng(0)
y = np.arange(512) % 4
x = (np.eye(4)[y] @ rng.normal(size=(4, 32)) + rng.normal(size=(512, 32)) / 2).astype(np.float32)
data, test = (sslx.Pipeline(arrays(spectrum=x[s], label=y[s])) for s in (slice(384), slice(384, 512)))
config = sslx.Config(Autoencode(), data, sslx.AdamW(sslx.Constant(1e-2)), steps=40, batch_size=64,
    save_every=20, log_every=10, evals={"probes": sslx.Probes(data, test, on=(KNN(5),))})
'''  # noqa: E501


def test_the_readme_goes_from_an_array_to_features(tmp_path, monkeypatch):
    """Its code, but for fewer steps; and the lines for debugging, on the run that it leaves."""
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    first, debugging = code
    assert len(first.split("\n\n")) == 2 and len(first.replace("\n\n", "\n").splitlines()) == 10
    said = commands.run(code=first.replace("steps=500", "steps=5"))
    run = sslx.Run.open("runs/array")
    assert run.metrics()["step"].max() == run.config.steps == 5
    assert f"(1797, 64) {run.metrics()['loss']}" in said
    loss = float(re.search(r"\(Array\((.*?),", commands.run(code=debugging))[1])
    assert 0 < loss < 2 * run.metrics()["loss"][-1]
    assert main(["export", "runs/array", "out"]) == 0 and (tmp_path / "out/config.json").exists()


def spectra():
    """The names that SPECTRUM defines."""
    names = {"__name__": "spectra"}
    exec(SPECTRUM, names)
    return names


def data(x, y):
    return sslx.arrays(spectrum=x, label=y)


MISTAKES = {
    "unpacked": ("return error.mean(), (buffers, {})", "return error.mean(), {}", "unpack"),
    "metric of its own": ("{})", "{'loss': error.mean()})", "metrics loss: a metric is a scalar"),
    "no scalar": ("{})", "{'error': error})", "metrics error: a metric is a scalar"),
    "no encoder": ('return {"spectra', 'return {} or {}\n        {"spectra', "no encoder"),
    "no value": ("width: int = 8", "width: object = object()", "object at 0x.*frozen dataclass"),
    "not frozen": ("@dataclass(frozen=True)", "@dataclass", r"Autoencode is no value.*frozen=True"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_method_are_named(mistake, tmp_path):
    """Before anything is evaluated or saved."""
    right, wrong, message = MISTAKES[mistake]
    assert SPECTRUM.count(right) == 1
    code = SPECTRUM.replace(right, wrong)
    with pytest.raises((ValueError, TypeError), match=message):
        exec(code + "sslx.fit(config, RUN)", {"__name__": "spectra", "RUN": tmp_path / "run"})
    assert not (tmp_path / "run" / "evals.json").exists()


def test_a_method_of_a_made_up_modality(tmp_path, capfd):
    assert len(SPECTRUM.strip().splitlines()) <= 40
    names = spectra()
    config, x, y = names["config"], names["x"], names["y"]
    stopped = sslx.fit(dataclasses.replace(config, steps=20), tmp_path / "run").metrics()
    run = sslx.fit(config, tmp_path / "run", accept_changes=True)  # resumed at step 20
    whole = sslx.fit(config)
    assert stopped["step"].max() == 20 and run.metrics()["step"].max() == 40
    np.testing.assert_array_equal(run.metrics()["loss"][-1], whole.metrics()["loss"][-1])
    encoder, other = run.encoder("spectra"), whole.encoder()
    np.testing.assert_array_equal(encoder.variables["w"], other.variables["w"])
    features = run.features(x)
    expected = np.tanh(x.astype(np.float64) @ np.asarray(encoder.variables["w"], np.float64))
    np.testing.assert_allclose(features.x, expected, atol=1e-5)
    assert set(features.label) == {-1}
    np.testing.assert_array_equal(run.features(config.data.source).label, y[:384])
    scores = run.evaluate()
    assert list(scores) == ["step 40", "random init"]
    assert scores["step 40"]["knn/top1"] > 0.9
    with pytest.raises(ValueError, match="this encoder is encode") as refused:
        run.export(tmp_path / "out")
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "out").exists()
    again = run.evaluate(
        ("knn",), ({"spectrum": x[:384], "label": y[:384]}, data(x[384:], y[384:]))
    )
    assert again["step 40"]["knn/top1"] == scores["step 40"]["knn/top1"]
    assert {"step 40", "step 40 on arrays arrays"} <= set(run.scores())
    with pytest.raises(ValueError, match="give arrays like those in Python"):
        run.evaluate(data=("digits:train", "digits:test"))
    assert repr(encoder) == "Encoder(encode, of 256 numbers, reads spectrum)"
    assert repr(features) == "Features(x=[512, 8], label=[512])"
    assert main(["eval", str(tmp_path / "run"), "--on", "knn"]) == 0  # by the command line too
    assert "knn/top1" in capfd.readouterr().out


def test_a_number_that_is_none_is_named():
    optimizer = sslx.AdamW(sslx.Constant(float("nan")))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate\.value=nan is no number"):
        dataclasses.replace(sslx.load("mae_digits"), optimizer=optimizer)
