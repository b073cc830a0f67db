"""Evaluations against float64 NumPy and scikit-learn, on one device and on eight."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx import sharding
from sslx.config import Trained
from sslx.data.formats.arrays import arrays
from sslx.data.image import Image
from sslx.data.pipeline import Pipeline
from sslx.evals import KNN, Features, Health, LinearProbe, Probes, extract, features, health, knn
from sslx.evals.classes import numbering, renumbered
from sslx.evals.linear import score
from sslx.models.encoder import Encoder, Floor, Signature, encoder
from sslx.objectives.base import Objective
from sslx.ops.image import thumbnail
from sslx.views import Views


def blobs(n, D=16, classes=5, noise=2.0, seed=0):
    """Gaussian classes around fixed centers."""
    centers = np.random.default_rng(9).normal(size=(classes, D))
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n).astype(np.int32)
    return Features((centers[y] + noise * rng.normal(size=(n, D))).astype(np.float32), y)


def digits():
    """1,437 training and 360 test digits, as 64 pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    x, y = (data.data[order] / 16).astype(np.float32), data.target[order].astype(np.int32)
    return Features(x[:1437], y[:1437]), Features(x[1437:], y[1437:])


# k-NN ------------------------------------------------------------------------------------------


def brute_force(train, x, k, temperature):
    """InstDisc, section 3.4, one full float64 similarity matrix."""
    bank, query = (
        z.astype(np.float64) / np.linalg.norm(z.astype(np.float64), axis=1, keepdims=True)
        for z in (train.x, x)
    )
    s = query @ bank.T
    near = np.argsort(-s, 1)[:, :k]
    votes = np.zeros((len(x), train.label.max() + 1))
    for i, row in enumerate(near):
        np.add.at(votes[i], train.label[row], np.exp(s[i, row] / temperature))
    return votes.argmax(1)


@pytest.mark.parametrize("queries, bank", [(1024, 8192), (37, 230)])
def test_knn_is_brute_force(monkeypatch, queries, bank):
    monkeypatch.setattr(knn, "QUERIES", queries)
    monkeypatch.setattr(knn, "BANK", bank)
    jax.clear_caches()  # the sizes are read while tracing
    train, test = blobs(1003, seed=1), blobs(301, seed=2)
    for probe in (KNN(), KNN(k=51, temperature=0.5)):
        expected = brute_force(train, test.x, probe.k, probe.temperature)
        np.testing.assert_array_equal(probe.predict(train, test.x), expected)
        ((name, value),) = probe(train, test)
        assert name == "knn/top1" and value == np.mean(expected == test.label)


def test_knn_finds_the_nearest():
    rng = np.random.default_rng(0)
    bank, query = rng.normal(size=(9001, 8)), rng.normal(size=(64, 8))
    s, at = knn.nearest(query.astype(np.float32), bank.astype(np.float32), jnp.arange(9001), 7)
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (bank, query)]
    exact = unit[1] @ unit[0].T
    np.testing.assert_array_equal(at, np.argsort(-exact, 1)[:, :7])
    np.testing.assert_allclose(s, -np.sort(-exact, 1)[:, :7], atol=1e-6)


def test_knn_on_eight_devices_is_that_of_one():
    train, test = blobs(700, seed=1), blobs(512, seed=2)
    one = Mesh(np.array(jax.devices()[:1]), ("rows",), axis_types=(AxisType.Auto,))
    assert features.local_mesh(512).size == 8
    alone = KNN().predict(train, test.x, one)
    np.testing.assert_array_equal(KNN().predict(train, test.x), alone)


def test_knn_survives_a_small_temperature_and_a_missing_class():
    train, test = blobs(200, seed=1), blobs(100, seed=2)
    assert set(KNN(temperature=1e-3).predict(train, test.x)) <= set(range(5))
    few = Features(train.x[train.label < 3], train.label[train.label < 3])
    gap = Features(few.x, np.where(few.label == 1, 4, few.label).astype(np.int32))
    assert set(KNN().predict(gap, test.x)) <= {0, 2, 4}


def test_knn_wants_k_neighbors():
    with pytest.raises(ValueError, match=r"use KNN\(k=10\)"):
        list(KNN()(blobs(10), blobs(5)))


# linear probe ----------------------------------------------------------------------------------


def sgd(train, rate, batches, classes):
    """Momentum SGD on softmax regression over standardized features, float64, cosine to 0."""
    x, total = train.x.astype(np.float64), len(batches)
    mean, scale = x.mean(0), 1 / np.sqrt(x.var(0) + 1e-6)
    x, Y = (x - mean) * scale, np.eye(classes)[train.label]
    w, b = np.zeros((x.shape[1], classes)), np.zeros(classes)
    w_m, b_m = np.zeros_like(w), np.zeros_like(b)
    for t, rows in enumerate(batches):
        z = x[rows] @ w + b
        p = np.exp(z - z.max(1, keepdims=True))
        g = (p / p.sum(1, keepdims=True) - Y[rows]) / len(rows)
        w_m, b_m = 0.9 * w_m + x[rows].T @ g, 0.9 * b_m + g.sum(0)
        lr = rate * (1 + np.cos(np.pi * t / total)) / 2
        w, b = w - lr * w_m, b - lr * b_m
    return w, b


def test_linear_is_plain_sgd():
    train, rates = blobs(130), (0.01, 0.3)
    linear = LinearProbe(rates, epochs=3, batch_size=32, seed=5)
    heads = linear.fit(train, rates, 5, linear.epochs)
    batches = []
    for e in range(3):
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(5), e), 130)
        batches += list(np.asarray(order)[:128].reshape(4, 32))
    for r, rate in enumerate(rates):
        w, b = sgd(train, rate, batches, 5)
        np.testing.assert_allclose(heads["w"][r], w, atol=2e-5)
        np.testing.assert_allclose(heads["b"][r], b, atol=2e-5)


def test_a_sweep_is_each_rate_alone():
    train, test = blobs(300, seed=1), blobs(200, seed=2)
    linear = LinearProbe(epochs=5, batch_size=64)
    assert features.local_mesh(len(linear.learning_rates)).size == 8
    together = linear.fit(train, linear.learning_rates, 5, linear.epochs)
    for r, rate in enumerate(linear.learning_rates):
        alone = linear.fit(train, (rate,), 5, linear.epochs)
        np.testing.assert_allclose(together["w"][r], alone["w"][0], atol=1e-4, rtol=1e-4)
        assert score(alone, test)[0] == score(together, test)[0][r]


def test_linear_reaches_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, test = digits()
    scaler = StandardScaler().fit(train.x)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(train.x), train.label)
    expected = model.score(scaler.transform(test.x), test.label)
    found = dict(LinearProbe()(train, test))
    assert found["linear/top1"] > expected - 0.015
    assert found == dict(LinearProbe()(train, test))  # deterministic


def test_test_labels_do_not_choose_the_rate():
    train, test = blobs(300, seed=1), blobs(200, seed=2)
    linear = LinearProbe((0.001, 0.1), epochs=5, batch_size=64)
    shuffled = Features(test.x, np.random.default_rng(0).permutation(test.label))
    honest, other = dict(linear(train, test)), dict(linear(train, shuffled))
    assert honest["linear/learning_rate"] == other["linear/learning_rate"]
    assert honest["linear/top1"] > other["linear/top1"] + 0.1


def test_linear_chooses_by_held_out_rows():
    assert LinearProbe((1e-9, 0.1), epochs=5).select(blobs(300)) == 0.1
    assert LinearProbe((0.1, 1e-9), epochs=5).select(blobs(300)) == 0.1


def test_linear_takes_a_missing_class_and_refuses_none_held_out():
    train, test = blobs(300, seed=1), blobs(200, seed=2)
    few = Features(train.x[train.label < 3], train.label[train.label < 3])
    assert 0.1 < dict(LinearProbe((0.01, 0.1), epochs=5)(few, test))["linear/top1"] < 0.7
    with pytest.raises(ValueError, match="give more examples"):
        LinearProbe().select(blobs(1))


# health ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, D", [(500, 32), (20, 64)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 8.0])
def test_rankme_is_that_of_a_float64_svd(n, D, decay):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(n, D)) * np.exp(-decay * np.arange(D) / 8)).astype(np.float32)
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = s / s.sum() + 1e-7
    assert health.rankme(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_uniformity_and_alignment_are_brute_force(monkeypatch):
    monkeypatch.setattr(health, "CHUNK", 48)
    x, y = blobs(301, seed=1).x, blobs(301, seed=2).x
    a, b = (z / np.linalg.norm(z.astype(np.float64), axis=1, keepdims=True) for z in (x, y))
    square = np.square(a[:, None] - a[None]).sum(-1)[~np.eye(301, dtype=bool)]
    assert health.uniformity(x) == pytest.approx(np.log(np.exp(-2 * square).mean()), rel=1e-5)
    assert health.alignment(x, y) == pytest.approx(np.square(a - b).sum(1).mean(), rel=1e-5)


def test_health_tells_alive_from_collapsed():
    sphere = Features(np.random.default_rng(0).normal(size=(2000, 64)), np.zeros(2000, np.int32))
    alive = dict(Health()(sphere, sphere, lambda: (sphere.x, -sphere.x)))
    assert alive["health/feature_std"] == pytest.approx(1, abs=0.01)
    assert alive["health/rankme"] > 62 and alive["health/uniformity"] < -3.5
    assert alive["health/alignment"] == pytest.approx(4)
    for value in (0, 3):
        dead = Features(np.full((100, 64), value, np.float32), np.zeros(100, np.int32))
        dead = dict(Health()(dead, dead))
        assert abs(dead["health/feature_std"]) < 1e-6 and abs(dead["health/uniformity"]) < 1e-5
        assert "health/alignment" not in dead
    assert dead["health/rankme"] == pytest.approx(1, abs=0.01)


# features and probes ---------------------------------------------------------------------------

traces = []


class Patches(nn.Module):
    """A class token, then 4 x 4 patches, embedded; it counts its traces."""

    width: int = 12
    dtype: jnp.dtype = jnp.float32
    signature: ClassVar[Signature] = Signature(("image",), prefix=1)

    @nn.compact
    def __call__(self, x, train=False):
        assert not train
        traces.append(x.shape)
        x = nn.Conv(self.width, (4, 4), (4, 4), dtype=self.dtype)(x)
        x = x.reshape(len(x), -1, self.width)
        return jnp.concatenate([-x[:, :1], x], 1)


@dataclass(frozen=True)
class Scale:
    """[0, 1], and V noisy renderings where V is not 0."""

    views: int = 0

    def __call__(self, key, batch):
        x = batch["image"].astype(jnp.float32) / 255
        if self.views:
            x = x[:, None] + 0.1 * jax.random.normal(key, (len(x), self.views, *x.shape[1:]))
        return {"image": x}


VIEWS = Views(Scale(2), Scale())


def images(n, seed=0, labels="all"):
    """n noisy images, red or blue; `labels` none, missing (-1) or all."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=n).astype(np.int32)
    x = rng.integers(128, size=(n, 8, 8, 3))
    x[np.arange(n), ..., 2 * y] += 127
    y = y if labels == "all" else np.full_like(y, -1)
    leaves = {"image": x.astype(np.uint8), "extent": np.full((n, 2), 8, np.int32)}
    return Pipeline(arrays(**leaves, **({} if labels == "none" else {"label": y})))


def variables(module=None, seed=0):
    return (module or Patches()).init(jax.random.key(seed), jnp.zeros((1, 8, 8, 3)))


def patches(params=None, **fields):
    """Patches as an encoder."""
    return encoder(Patches(**fields), params or variables())


PIXELS = Encoder({}, Floor("pixels", thumbnail), Signature(("image",)))


def test_extract_is_the_forward_pass_of_valid_rows():
    module, params, (batch,) = Patches(), variables(), images(100).epoch(100)
    tokens = module.apply(params, batch["image"].astype(np.float32) / 255)
    for pool, expected in (("mean", tokens[:, 1:].mean(1)), ("first", tokens[:, 0])):
        whole = extract(encoder(module, params), Scale(), images(100), 100, pool)
        parts = extract(encoder(module, params), Scale(), images(100), 7, pool)
        assert whole.x.dtype == np.float32 and whole.label.dtype == np.int32
        np.testing.assert_allclose(whole.x, expected, atol=1e-6)
        np.testing.assert_allclose(whole.x, parts.x, atol=1e-6)
        np.testing.assert_array_equal(whole.label, batch["label"])
        np.testing.assert_array_equal(parts.label, batch["label"])
    half = extract(patches(params, dtype=jnp.bfloat16), Scale(), images(100), 100)
    assert half.x.dtype == np.float32
    np.testing.assert_allclose(half.x, tokens[:, 1:].mean(1), atol=0.02)


def test_extract_compiles_once():
    data = images(50)
    early, late = variables(Patches(5), 0), variables(Patches(5), 1)
    traces.clear()
    first = extract(patches(early, width=5), Scale(), data, 16)
    second = extract(patches(late, width=5), Scale(), data, 16)
    assert traces == [(16, 8, 8, 3)]
    assert np.abs(first.x - second.x).max() > 0.01


@pytest.mark.parametrize("tensor", [1, 2])
def test_extract_on_eight_devices_is_that_of_one(tensor):
    mesh = sharding.Mesh(tensor=tensor).build()
    batch = sharding.batch_sharding(mesh)
    alone = extract(patches(variables()), Scale(), images(100), 16)
    with jax.set_mesh(mesh):
        params = jax.device_put(variables(), NamedSharding(mesh, P()))
        spread = extract(patches(params), Scale(), images(100), 16, sharding=batch)
        np.testing.assert_allclose(spread.x, alone.x, atol=1e-6)
        np.testing.assert_array_equal(spread.label, alone.label)
        trained = Trained(Probed(), params["params"], {}, VIEWS, batch)
        with jax.transfer_guard("disallow"):  # as the loop that calls it may have it
            found = dict(PROBES(trained))
        odd = dict(replace(PROBES, batch_size=30)(trained))
    assert found["knn/top1"] > 0.95
    assert odd == dict(replace(PROBES, batch_size=32)(trained))


def test_extract_names_what_is_wrong():
    params = variables()
    assert set(extract(patches(params), Scale(), images(9, labels="none"), 4).label) == {-1}
    unlabelled = extract(patches(params), Scale(), images(40, labels="missing"), 8)
    for probe in (KNN(), LinearProbe()):
        with pytest.raises(ValueError, match="have no label"):
            list(probe(unlabelled, unlabelled))
    assert dict(Health()(unlabelled, unlabelled))
    with pytest.raises(ValueError, match="use pool='mean'"):
        extract(PIXELS, Scale(), images(9), 4, "first")
    with pytest.raises(ValueError, match="not finite in 9 of 9"):
        extract(patches(jax.tree.map(lambda p: p * np.nan, params)), Scale(), images(9), 4)
    with pytest.raises(ValueError, match="not finite in 1 of 3"):
        Features(np.array([[1.0], [np.inf], [0]], np.float32), np.zeros(3, np.int32))


class Probed(Objective):
    """Nothing but its encoder."""

    def init(self, key, batch):
        raise NotImplementedError

    def loss(self, params, buffers, batch, key, step):
        raise NotImplementedError

    def encoders(self, params, buffers):
        return {"encoder": patches({"params": params, **buffers})}


PROBES = Probes(
    images(200, 1),
    images(100, 2),
    (KNN(), LinearProbe((0.03, 0.3), epochs=5), Health()),
    batch_size=32,
)


def test_probes_measure_an_encoder_and_pixels():
    found = dict(PROBES(Trained(Probed(), variables()["params"], {}, VIEWS)))
    assert {name.split("/")[0] for name in found} == {"knn", "linear", "health"}
    assert all(type(value) is float for value in found.values())
    assert found["knn/top1"] > 0.95 and found["linear/top1"] > 0.95
    assert 0 < found["health/alignment"] < 0.1
    assert found == dict(PROBES(Trained(Probed(), variables()["params"], {}, VIEWS)))
    pixels = dict(
        replace(PROBES, on=(KNN(), Health())).measure(PIXELS, Trained(Probed(), {}, {}, VIEWS))
    )
    assert pixels["knn/top1"] > 0.95 and 0 < pixels["health/alignment"] < 2
    assert {PROBES: 1}[replace(PROBES)] == 1 and "KNN(k=20" in repr(PROBES)


def test_pairs_are_two_renderings_and_only_made_if_asked():
    seen = {}

    def probe(train, test, pairs, progress):
        seen["x"], seen["y"] = pairs()
        yield "none", 0.0

    for views in (VIEWS, Views(Scale(1), Scale())):
        list(
            replace(PROBES, on=(probe,), pairs=64).measure(PIXELS, Trained(Probed(), {}, {}, views))
        )
        gap = seen["x"] - seen["y"]
        assert gap.shape == (64, 192) and np.std(gap) == pytest.approx(0.1 * 2**0.5, rel=0.05)


# Classes by name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train, test, numbers",
    [
        ("ant bee cow", "ant bee cow", [0, 1, 2]),
        ("ant bee cow", "cow bee", [2, 1]),
        ("Ant bee", "BEE ant", [1, 0]),
        ("sea_lion Sea-Horse", "sea-horse sea_lion", [1, 0]),
        ("a\u0308 b", "b \u00e4", [1, 0]),  # as macOS writes names, and as others do
        ("Cat cat", "cat Cat", [1, 0]),
        ("crane crane dog", "crane crane dog", [0, 1, 2]),  # as ImageNet-1k has it
        ("", "ant bee", []),
        ("ant bee", "", []),
    ],
)
def test_classes_are_numbered_by_name(train, test, numbers):
    assert numbering(train.split(), test.split()) == numbers


@pytest.mark.parametrize(
    "train, test", [("ant bee", "ant cow"), ("crane crane", "crane dog"), ("Cat cAt", "cat")]
)
def test_a_class_that_training_lacks_is_refused(train, test):
    sides = f"Training has {', '.join(sorted(train.split()))}; the test set has"
    with pytest.raises(ValueError, match=f"lacks, or has twice: .*{test[-3:]}.*{sides}"):
        numbering(train.split(), test.split())


def test_labels_follow_their_names():
    x = np.eye(4, dtype=np.float32)
    test = Features(x, np.array([0, 1, -1, 0], np.int32))
    assert renumbered(test, [2, 0]).label.tolist() == [2, 0, -1, 2]
    assert renumbered(test, [2, 0]).label.dtype == np.int32
    assert renumbered(test, []) is test
    with pytest.raises(ValueError, match="a label 1 but names 1 classes"):
        renumbered(test, [0])


def test_a_label_for_each_example_is_no_class():
    with pytest.raises(ValueError, match="2 examples have labels up to 1073741824: number the"):
        list(KNN(k=1)(Features(np.eye(2), np.array([0, 2**30])), blobs(3, D=2)))


def test_sets_are_matched_by_the_names_of_their_folders(tmp_path, caplog):
    """The test set lacks the class that sorts first; its pictures are those of the training set."""
    colors = {"ant": 10, "bee": 90, "cow": 250}
    for folder, names in {"train": colors, "test": ("bee", "cow"), "other": ("bee", "dog")}.items():
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((8, 8, 3), 128, np.uint8)
                pixels[:, : 4 + i, :2] = colors.get(name, 0)
                PIL.Image.fromarray(pixels).save(tmp_path / folder / name / f"{i}.png")
    train, test, other = (
        Pipeline(f"folder:{tmp_path}/{name}", Image(8), workers=0)
        for name in ("train", "test", "other")
    )
    probes = replace(PROBES, train=train, test=test, on=(KNN(k=1),), batch_size=8)
    probes.check()
    trained = Trained(Probed(), {}, {}, VIEWS)
    assert dict(probes.measure(PIXELS, trained)) == {"knn/top1": 1.0}
    with pytest.raises(ValueError, match=r"lacks, or has twice: dog. .* ant, bee, cow; .*bee, dog"):
        replace(probes, test=other).check()
    assert not caplog.records
    replace(probes, test=replace(test, source="digits:test")).check()
    assert "names its classes and digits:test only numbers them" in caplog.text
