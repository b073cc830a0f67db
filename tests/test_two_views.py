"""SimCLR and BYOL against float64 NumPy and torch; collapse, chunks, and what they refuse."""

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import BATCH, Convolved, mesh_of, placed, two_views
from flax import linen as nn
from flax.core.meta import unbox

from sslx.evals import health as evals
from sslx.models import heads
from sslx.models.encoder import Signature
from sslx.models.heads import Head, Siamese
from sslx.models.resnet import ResNet, Stem
from sslx.models.vit import ViT
from sslx.objectives.base import apply
from sslx.objectives.byol import BYOL
from sslx.objectives.simclr import SimCLR
from sslx.ops.health import embedding_metrics
from sslx.ops.losses import nt_xent, regression
from sslx.schedules import Constant, Cosine

KEY, STEP = jax.random.key(0), jnp.int32(0)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


class Flat(nn.Module):
    """One token: all pixels."""

    signature: ClassVar[Signature] = Signature(("image",))

    def __call__(self, x, train: bool = False):
        return x.reshape(len(x), 1, -1)


def linear(width: int) -> Head:
    """One matrix."""
    return Head((width,), norm="none", bias="none")


def started(objective, batch):
    return unbox(jax.jit(objective.init)(KEY, batch))


def stepped(objective, params, buffers, batch):
    """((loss, (buffers, metrics)), gradient)."""
    both = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    return both(params, buffers, batch, KEY, STEP)


def relative(tree, other) -> float:
    """Largest difference of any leaf over the largest magnitude of that leaf."""

    def leaf(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return np.abs(x - y).max() / np.abs(y).max()

    return max(jax.tree.leaves(jax.tree.map(leaf, tree, other)))


def vectors(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- NT-Xent ----


def contrast(z, temperature):
    """Mean NT-Xent over anchors of z [B, 2, P] and its gradient by hand, float64, view-major."""
    n, width = len(z), z.shape[-1]
    x = z.astype(np.float64).transpose(1, 0, 2).reshape(2 * n, width)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    u = x / length
    logits = u @ u.T / temperature
    np.fill_diagonal(logits, -np.inf)
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    positive = (np.arange(2 * n), np.roll(np.arange(2 * n), n))
    loss = -np.log(share[positive]).mean()
    share[positive] -= 1
    du = (share + share.T) @ u / temperature / (2 * n)
    dx = (du - u * (du * u).sum(1, keepdims=True)) / length
    return loss, dx.reshape(2, n, width).transpose(1, 0, 2)


@pytest.mark.parametrize("reduction, times", [("anchors", 1), ("directions", 2)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_simclr_is_nt_xent_by_hand(reduction, times, chunks):
    net = Siamese(Flat(), linear(5))
    objective = SimCLR(net, 0.2, reduction, chunks)
    batch = {"image": vectors(6, 2, 2, 2, 2)}
    params, buffers = started(objective, batch)
    (loss, _), grads = stepped(objective, params, buffers, batch)
    x = batch["image"].reshape(12, 8).astype(np.float64)
    z = (x @ np.asarray(params["projector"]["linear0"]["kernel"], np.float64)).reshape(6, 2, 5)
    expected, dz = contrast(z, 0.2)
    assert relative(loss, times * expected) < 1e-6
    kernel = x.T @ dz.reshape(12, 5)
    assert relative(grads["projector"]["linear0"]["kernel"], times * kernel) < 1e-5


def test_nt_xent_is_torchs_cross_entropy():
    torch = pytest.importorskip("torch", reason="NOT CHECKED: that NT-Xent is torch's")
    z = vectors(8, 2, 16)
    x = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    u = torch.nn.functional.normalize(torch.cat([x[:, 0], x[:, 1]]), dim=1)
    logits = (u @ u.T / 0.5).fill_diagonal_(-torch.inf)
    labels = torch.arange(16).roll(8)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    expected.backward()
    loss, slope = jax.value_and_grad(lambda z: nt_xent(z, 0.5).mean())(z)
    assert relative(loss, expected.item()) < 1e-6
    assert relative(slope, x.grad.numpy()) < 1e-5


@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
def test_nt_xent_at_its_ends(temperature):
    """All vectors one: a uniform guess among 2 B - 1. Pairs orthogonal to all others: in closed
    form. A zero vector: finite, and so is its gradient."""
    both = jax.jit(jax.value_and_grad(lambda z: nt_xent(z, temperature).mean()))
    loss, slope = both(np.ones((8, 2, 4), np.float32))
    ulp = np.finfo(np.float32).eps / temperature  # of the largest logit
    np.testing.assert_allclose(loss, np.log(15), atol=max(ulp, 1e-6))
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    loss, _ = both(np.repeat(np.eye(8, dtype=np.float32)[:, None], 2, 1) * 7)
    np.testing.assert_allclose(loss, np.log1p(14 * np.exp(-1 / temperature)), rtol=1e-5, atol=1e-7)
    loss, slope = both(np.float32(np.arange(8)[:, None, None] > 0) * np.ones((8, 2, 4), np.float32))
    assert np.isfinite(loss) and np.isfinite(slope).all()


def test_similarity_is_float32_and_exact_on_accelerators():
    z = jnp.asarray(vectors(8, 2, 16), jnp.bfloat16)
    with jax.default_matmul_precision("default"):
        text = jax.jit(lambda z: nt_xent(z, 0.1)).lower(z).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("[HIGHEST, HIGHEST]" in line for line in products)
    assert not any("bf16" in line for line in products)
    assert nt_xent(z, 0.1).dtype == regression(z[:, 0], z[:, 1]).dtype == jnp.float32


# ---- chunks ----

VIT = ViT(32, 2, 4, patch=4)


def big(seed: int = 0) -> dict:
    return {"image": vectors(64, 2, 8, 8, 1, seed=seed)}


def test_chunks_are_the_whole_batch_in_less_memory(capsys):
    """Behind a projector with BatchNorm: that one still sees all 128."""
    whole = SimCLR(Siamese(VIT, heads.simclr(2, 64, 32)))
    params, buffers = started(whole, big())
    results, memory = [], []
    for chunks in (1, 8):
        both = jax.jit(jax.value_and_grad(replace(whole, chunks=chunks).loss, has_aux=True))
        compiled = both.lower(params, buffers, big(), KEY, STEP).compile()
        results.append(compiled(params, buffers, big(), KEY, STEP))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    with capsys.disabled():
        print(f"\n  SimCLR, ViT, 128 views: {memory[0]:,} bytes whole, {memory[1]:,} in 8 chunks")
    ((loss, aux), grads), ((same, again), summed) = results
    # The last bias moves all features of a batch: what is left of its gradient is rounding.
    for tree in (grads, summed):
        assert np.abs(tree["encoder"]["transformer"]["norm"].pop("bias")).max() < 1e-4
    assert relative(same, loss) < 1e-5
    assert relative(again, aux) < 1e-5
    assert relative(summed, grads) < 1e-5
    assert memory[1] < memory[0] / 3


def test_similarities_are_never_whole(capsys):
    z, memory, slopes = vectors(512, 2, 16), [], []
    for chunks in (1, 8):
        slope = jax.jit(jax.grad(lambda z, chunks=chunks: nt_xent(z, 0.1, chunks).mean()))
        compiled = slope.lower(z).compile()
        slopes.append(compiled(z))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    with capsys.disabled():
        print(f"\n  NT-Xent, 1024 anchors: {memory[0]:,} bytes whole, {memory[1]:,} in 8 chunks")
    assert relative(slopes[1], slopes[0]) < 1e-5
    assert memory[1] < memory[0] / 3
    assert memory[1] < 4 * 1024**2  # the matrix itself
    assert (
        relative(nt_xent(jnp.asarray(z), 0.1, 8), nt_xent(jnp.asarray(z), 0.1)) < 1e-5
    )  # in order


def test_on_a_mesh_no_device_has_all_similarities():
    mesh = mesh_of(1, 8, 1)
    z = placed({"z": vectors(64, 2, 16)}, mesh)["z"]
    with jax.set_mesh(mesh):
        slope = jax.jit(jax.value_and_grad(lambda z: nt_xent(z, 0.1).mean()))
        text = slope.lower(z).compile().as_text()
        assert "f32[16,128]" in text and "f32[128,128]" not in text
        assert relative(slope(z)[1], contrast(np.asarray(z), 0.1)[1]) < 1e-5


def test_chunks_of_batchnorm_are_ghosts():
    """Every chunk by its own statistics; the running ones move once, by the mean over chunks."""
    net = Siamese(Convolved(), linear(16))
    objective, batch = SimCLR(net, chunks=4), two_views(0)
    params, buffers = started(objective, batch)
    (loss, (moved, _)), _ = stepped(objective, params, buffers, batch)
    z, stats = np.zeros((BATCH, 2, 16), np.float32), []
    for i in range(4):
        part = jnp.asarray(batch["image"][i::4].reshape(-1, 8, 8, 1))
        (_, z_i, _), own = apply(net, params, buffers["stats"], part)
        z[i::4] = np.asarray(z_i).reshape(-1, 2, 16)
        stats.append(own)
    assert relative(loss, 2 * contrast(z, 0.1)[0]) < 1e-5
    assert relative(moved["stats"], jax.tree.map(lambda *x: np.mean(x, 0), *stats)) < 1e-5
    (other, _), _ = stepped(replace(objective, chunks=1), params, buffers, batch)
    assert relative(other, loss) > 1e-4


# ---- batch statistics ----


def normed() -> Head:
    return Head((6, 4), norm="hidden", bias="none")


def test_simclr_normalizes_both_views_together():
    objective, batch = SimCLR(Siamese(Flat(), normed())), {"image": vectors(6, 2, 2, 2, 2)}
    params, buffers = started(objective, batch)
    (_, (moved, _)), _ = stepped(objective, params, buffers, batch)
    x = batch["image"].reshape(12, 8).astype(np.float64)
    x = x @ np.asarray(params["projector"]["linear0"]["kernel"], np.float64)
    stats = moved["stats"]["batch_stats"]["projector"]["norm0"]
    assert relative(stats["mean"], 0.1 * x.mean(0)) < 1e-5
    assert relative(stats["var"], 0.9 + 0.1 * x.var(0)) < 1e-5  # biased: not torch's


def test_byol_normalizes_each_view_apart_and_the_target_by_its_own():
    """Running statistics of view one, then of view two; the loss from each view's own."""
    net = Siamese(Flat(), normed(), linear(4))
    objective, batch = BYOL(net, Constant(0.5)), {"image": vectors(6, 2, 2, 2, 2)}
    params, buffers = started(objective, batch)
    (loss, (moved, _)), _ = stepped(objective, params, buffers, batch)
    x = batch["image"].reshape(6, 2, 8).astype(np.float64)

    def project(params, view):  # and what BatchNorm sees
        w = [np.asarray(params["projector"][f"linear{i}"]["kernel"], np.float64) for i in (0, 1)]
        y = x[:, view] @ w[0]
        return np.maximum((y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5), 0) @ w[1], y

    def normal(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    w = np.asarray(params["predictor"]["linear0"]["kernel"], np.float64)
    slow = buffers["target"]["params"]
    error = 0
    for view in (0, 1):
        q, z = normal(project(params, view)[0] @ w), normal(project(slow, 1 - view)[0])
        error += np.square(q - z).sum(1).mean()
    assert relative(loss, error) < 1e-5
    for of, stats in ((params, moved["stats"]), (slow, moved["target"]["stats"])):
        y = [project(of, view)[1] for view in (0, 1)]
        stats = stats["batch_stats"]["projector"]["norm0"]
        assert relative(stats["mean"], 0.09 * y[0].mean(0) + 0.1 * y[1].mean(0)) < 1e-5
        assert relative(stats["var"], 0.81 + 0.09 * y[0].var(0) + 0.1 * y[1].var(0)) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, moved["target"]["params"], slow)  # until `update`


# ---- BYOL ----


def test_regression_and_its_gradient_by_hand():
    q, z = vectors(7, 5).astype(np.float64), vectors(7, 5, seed=1).astype(np.float64)
    length = np.linalg.norm(q, axis=1, keepdims=True)
    u, v = q / length, z / np.linalg.norm(z, axis=1, keepdims=True)
    cosine = (u * v).sum(1, keepdims=True)
    q32, z32 = jnp.asarray(q, jnp.float32), jnp.asarray(z, jnp.float32)
    assert relative(regression(q32, z32), 2 - 2 * cosine[:, 0]) < 1e-6
    slope = jax.grad(lambda q: regression(q, z32).sum())(q32)
    assert relative(slope, -2 * (v - cosine * u) / length) < 1e-5


def test_byols_loss_and_gradient_by_hand():
    """Linear networks: both directions summed, the mean over the batch, none through the target."""
    objective = BYOL(Siamese(Flat(), linear(5), linear(5)), Constant(0.9))
    batch = {"image": vectors(6, 2, 2, 2, 2)}
    params, buffers = started(objective, batch)
    (loss, _), grads = stepped(objective, params, buffers, batch)
    x = batch["image"].reshape(6, 2, 8).astype(np.float64).transpose(1, 0, 2)
    a, b, c = (
        np.asarray(tree["linear0"]["kernel"], np.float64)
        for tree in (
            params["projector"],
            params["predictor"],
            buffers["target"]["params"]["projector"],
        )
    )
    expected, da, db = 0.0, np.zeros_like(a), np.zeros_like(b)
    for one, two in ((x[0], x[1]), (x[1], x[0])):
        q, t = one @ a @ b, two @ c
        length = np.linalg.norm(q, axis=1, keepdims=True)
        u, v = q / length, t / np.linalg.norm(t, axis=1, keepdims=True)
        expected += np.square(u - v).sum(1).mean()
        dq = -2 * (v - (u * v).sum(1, keepdims=True) * u) / length / 6
        da, db = da + one.T @ dq @ b.T, db + (one @ a).T @ dq
    assert relative(loss, expected) < 1e-6
    assert relative(grads["projector"]["linear0"]["kernel"], da) < 1e-5
    assert relative(grads["predictor"]["linear0"]["kernel"], db) < 1e-5


def test_both_networks_of_byol_are_encoders():
    small = ResNet(kernels=(3, 3), blocks=(1,), channels=8, stem=Stem(3, 1, 1, False))
    objective = BYOL(Siamese(small, linear(4), linear(4)), Constant(0.5))
    params, buffers = started(objective, {"image": vectors(4, 2, 8, 8, 3)})
    found = objective.encoders(params, buffers)
    image = {"image": jnp.asarray(vectors(4, 8, 8, 3))}
    assert list(found) == ["online", "target"]
    slow = buffers["target"]
    for name, of, stats in (
        ("online", params, buffers["stats"]),
        ("target", slow["params"], slow["stats"]),
    ):
        variables = {"params": of["encoder"], "batch_stats": stats["batch_stats"]["encoder"]}
        tokens = objective.net.encoder.apply(variables, image["image"], train=False)
        np.testing.assert_array_equal(found[name](image)[0], tokens)
    assert relative(found["online"](image)[0], found["target"](image)[0]) > 0.1


def test_the_target_follows_params_alone():
    """By 1 - (1 - tau) (cos(pi k / K) + 1) / 2, from a start of its own; statistics stay."""
    objective = BYOL(Siamese(Flat(), normed(), linear(4)), Cosine(0.9, 1.0, 10))
    batch = two_views(0)
    params, buffers = started(objective, batch)
    slow = buffers["target"]["params"]
    assert set(slow) == {"projector"}  # the encoder has none
    assert relative(slow["projector"]["linear0"], params["projector"]["linear0"]) > 0.1
    online = np.asarray(params["projector"]["linear0"]["kernel"], np.float64)
    expected = np.asarray(slow["projector"]["linear0"]["kernel"], np.float64)
    for k in (0, 1, 5, 9, 10):
        tau = 1 - (1 - 0.9) * (np.cos(np.pi * k / 10) + 1) / 2
        expected = tau * expected + (1 - tau) * online
        _, moved = jax.jit(objective.update)(params, buffers, jnp.int32(k))
        assert (
            relative(moved["target"]["params"]["projector"]["linear0"]["kernel"], expected) < 1e-6
        )
        for kept in (lambda b: b["stats"], lambda b: b["target"]["stats"]):
            jax.tree.map(np.testing.assert_array_equal, kept(moved), kept(buffers))
        buffers = moved


# ---- heads ----


def test_heads_are_the_published_ones():
    """Shapes, biases and spread of the initial kernels on ResNet-50's 2048 features."""

    def shapes(head):
        tree = unbox(jax.eval_shape(head.init, KEY, jnp.zeros((2, 2048)))["params"])
        return {f"{a}/{b}": x.shape for a, leaves in tree.items() for b, x in leaves.items()}

    square, last = (2048, 2048), (2048, 128)
    norm = {f"norm{i}/{b}": (2048,) for i in (0, 1) for b in ("scale", "bias")}
    kernels = {"linear0/kernel": square, "linear1/kernel": square, "linear2/kernel": last}
    assert shapes(heads.simclr()) == kernels | norm | {"norm2/scale": (128,)}
    assert shapes(heads.byol()) == {
        "linear0/kernel": (2048, 4096),
        "linear0/bias": (4096,),
        "norm0/scale": (4096,),
        "norm0/bias": (4096,),
        "linear1/kernel": (4096, 256),
    }
    plain = heads.simclr(2, out=256, norm="none", bias="all", std=None)
    assert set(shapes(plain)) == {f"linear{i}/{b}" for i in (0, 1) for b in ("kernel", "bias")}

    def kernel(head):
        return unbox(jax.jit(head.init)(KEY, jnp.zeros((2, 256)))["params"]["linear0"]["kernel"])

    assert abs(kernel(heads.simclr(2, 256)).std() / 0.01 - 1) < 0.02
    cut = kernel(heads.byol(256)) * 256**0.5  # a normal cut at two has a std of .8796
    assert abs(cut.std() / 0.8796 - 1) < 0.02 and 1.95 < abs(cut).max() <= 2


def test_half_precision_heads_keep_float32_statistics():
    head = heads.byol(32, 8, dtype=jnp.bfloat16)
    x = jnp.asarray(vectors(64, 16) + 20)  # far from zero: bfloat16 has steps of 1/8 there
    variables = unbox(head.init(KEY, x))
    z, moved = head.apply(variables, x, train=True, mutable="batch_stats")
    assert z.dtype == jnp.bfloat16
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves((variables, moved)))


# ---- health ----


def test_health_in_the_step_is_that_of_all_pairs():
    h, z = vectors(9, 2, 12) + 1, vectors(9, 2, 5) + 0.3
    said = {name: float(x) for name, x in jax.jit(embedding_metrics)(h, z).items()}
    flat = z.reshape(18, 5).astype(np.float64)
    u = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    s, example = u @ u.T, np.arange(18) // 2
    same = example[:, None] == example
    eigenvalues = np.linalg.eigvalsh(np.cov(u.T, bias=True))
    expected = {
        "feature_std": evals.feature_std(h.reshape(18, 12)),
        "embedding_std": evals.feature_std(z.reshape(18, 5)),
        "participation_ratio": eigenvalues.sum() ** 2 / np.square(eigenvalues).sum(),
        "positive_similarity": s[same & ~np.eye(18, dtype=bool)].mean(),
        "negative_similarity": s[~same].mean(),
    }
    assert said == pytest.approx(expected, rel=1e-5)


def test_health_at_its_ends():
    sphere, metrics = vectors(512, 2, 16), jax.jit(embedding_metrics)
    alive = metrics(sphere, sphere)
    assert abs(alive["embedding_std"] - 1) < 0.02 and 15 < alive["participation_ratio"] <= 16
    dead = metrics(*[np.ones((8, 2, 4), np.float32)] * 2)
    assert dead["embedding_std"] < 1e-6 and dead["participation_ratio"] < 1e-6
    assert dead["positive_similarity"] == pytest.approx(1)
    assert dead["negative_similarity"] == pytest.approx(1)
    line = vectors(64, 2, 1) * np.ones(8, np.float32)  # along one line
    assert metrics(line, line)["participation_ratio"] == pytest.approx(1, rel=1e-4)


def followed(objective, steps):
    """Metrics of the first and the last of `steps` steps of Adam on views of new digits."""
    params, buffers = started(objective, two_views(0))
    adam = optax.adam(3e-3)

    @jax.jit
    def step(params, buffers, moments, batch, i):
        both = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, (buffers, said)), grads = both(params, buffers, batch, KEY, i)
        updates, moments = adam.update(grads, moments)
        params = optax.apply_updates(params, updates)
        params, buffers = objective.update(params, buffers, i)
        return params, buffers, moments, {"loss": loss, **said}

    moments, history = adam.init(params), []
    for i in range(steps):
        params, buffers, moments, said = step(params, buffers, moments, two_views(i), i)
        history.append(said)
    return jax.device_get((history[0], history[-1]))


MLP = Head((64, 16), norm="none", bias="all")


def test_collapse_is_seen():
    """Without a predictor and with a target that is the net itself, every embedding becomes one:
    the loss has never looked better. With both, and SimCLR's negatives, they stay apart."""
    first, last = followed(BYOL(Siamese(Flat(), MLP), Constant(0.0)), 300)
    assert first["embedding_std"] > 0.4
    assert last["embedding_std"] < 0.05 and last["negative_similarity"] > 0.99
    assert last["loss"] < 0.01 and last["target_distance"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        BYOL(Siamese(Flat(), heads.byol(64, 16), heads.byol(64, 16)), Constant(0.99)),
        SimCLR(Siamese(Flat(), MLP)),
    ],
    ids=["BYOL", "SimCLR"],
)
def test_what_does_not_collapse_is_not_said_to(objective):
    _, last = followed(objective, 300)
    assert last["embedding_std"] > 0.5
    assert last["positive_similarity"] > last["negative_similarity"] + 0.3


# ---- what they refuse ----

NET = Siamese(Flat(), normed())


@pytest.mark.parametrize(
    "objective, recipe",
    [(SimCLR(NET), "simclr"), (BYOL(NET, Constant(0.9)), "byol")],
    ids=["SimCLR", "BYOL"],
)
@pytest.mark.parametrize(
    "shape, made",
    [((64, 224, 224, 3), "one view"), ((4, 1, 8, 8, 1), "one view"), ((4, 3, 8, 8, 1), "3 views")],
)
def test_another_number_of_views(objective, recipe, shape, made):
    batch = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    good = {"image": jax.ShapeDtypeStruct((4, 2, 8, 8, 1), jnp.float32)}
    params, buffers = unbox(jax.eval_shape(objective.init, KEY, good))
    with pytest.raises(ValueError) as at_init:
        jax.eval_shape(objective.init, KEY, batch)
    with pytest.raises(ValueError) as at_loss:
        jax.eval_shape(objective.loss, params, buffers, batch, KEY, STEP)
    name = type(objective).__name__
    assert str(at_init.value) == str(at_loss.value)
    assert str(at_init.value) == (
        f"{name} reads image [B, 2, H, W, C] but got {list(shape)}: "
        f"the recipe's views make {made}; use views.{recipe}(size)."
    )


def test_batchnorm_over_one_example():
    batch = {"image": jnp.zeros((1, 2, 8, 8, 1))}
    with pytest.raises(ValueError, match=r"BatchNorm trains on .*use a batch of two or more"):
        jax.eval_shape(BYOL(NET, Constant(0.9)).init, KEY, batch)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"temperature": 0.0}, "temperature=0.0: similarities are divided by it"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"chunks": 0}, "chunks=0: it counts parts"),
        ({"net": Siamese(Flat(), normed(), normed())}, "SimCLR has no predictor"),
    ],
    ids=str,
)
def test_simclr_refuses(fields, said):
    with pytest.raises(ValueError, match=said):
        SimCLR(**{"net": NET} | fields)


def test_chunks_that_do_not_divide():
    batch = {"image": jnp.zeros((8, 2, 8, 8, 1))}
    objective = SimCLR(Siamese(Flat(), linear(4)), chunks=3)
    params, buffers = started(objective, batch)
    with pytest.raises(ValueError, match="A batch of 8 does not divide into chunks=3"):
        jax.eval_shape(objective.loss, params, buffers, batch, KEY, STEP)


def test_the_first_token_needs_a_class_token():
    objective = SimCLR(Siamese(Flat(), linear(4), pool="first"))
    with pytest.raises(ValueError, match="pool='first' needs a class token"):
        jax.eval_shape(objective.init, KEY, two_views(0))
