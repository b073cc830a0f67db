"""The contract of every objective, item by item (the tests' numbers), on every row."""

import contextlib
import functools
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    BATCH,
    ROWS,
    Follow,
    Record,
    Row,
    config_of,
    fresh,
    mesh_of,
    moving,
    one_step,
    one_view,
    placed,
    recorded,
)
from half import half, losses

from sslx import engine
from sslx import state as state_of
from sslx.config import ConfigError, lines
from sslx.ops.trees import path_of
from sslx.views import Views

every_row = pytest.mark.parametrize("name", ROWS)
# All on two meshes, one on all: another mesh is another compilation.
SPLITS = [(name, shape) for name in ROWS for shape in ((1, 8, 1), (2, 2, 2))]
SPLITS += [("MAE", (8, 1, 1)), ("MLM", (1, 2, 4))]
every_split = pytest.mark.parametrize("name, shape", SPLITS, ids=str)


def abstract(row: Row):
    """Params, buffers, batch, key and step, as shapes."""
    state = state_of.abstract_state(config_of(row), mesh_of(1, 1, 1))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return shapes.params, shapes.buffers, row.batch(0), shapes.key, shapes.step


def kinds(tree):
    """Structure, shapes, dtypes and weakness of type: all that a compilation depends on."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


def relative(x, y) -> float:
    """Largest difference over largest magnitude."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)


def worst(tree, other) -> float:
    return max(jax.tree.leaves(jax.tree.map(relative, tree, other)), default=0.0)


@functools.cache
def trained(name: str):
    """Three steps on eight devices: states (as far as they live), metrics, and what was compiled
    for the second and third."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    step, start = recorded(name, 1, 8, 1)
    states = [start()]
    state, said = step(states[0], 0)
    states, metrics = [*states, state], [said]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed in (1, 2):
            state, said = step(state, seed)
            states, metrics = [*states, state], [*metrics, said]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return states, metrics, compiled


@every_row
def test_01_init_and_loss_trace(name):
    row = ROWS[name]
    params, buffers, batch, key, step = abstract(row)
    loss, (_, metrics) = jax.eval_shape(row.objective.loss, params, buffers, batch, key, step)
    assert loss.shape == () and loss.dtype == jnp.float32
    for scalar in jax.tree.leaves(metrics):
        assert scalar.shape == ()
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


@every_row
def test_02_buffers_keep_their_kind(name):
    row = ROWS[name]
    params, buffers, batch, key, step = abstract(row)
    _, (moved, _) = jax.eval_shape(row.objective.loss, params, buffers, batch, key, step)
    assert kinds(moved) == kinds(buffers)
    updated = jax.eval_shape(row.objective.update, params, moved, step)
    assert kinds(updated) == (kinds(params), kinds(buffers))


@every_row
def test_03_three_steps_one_compilation(name):
    states, metrics, compiled = trained(name)
    assert compiled == []
    assert int(states[-1].step) == 3
    assert np.isfinite([float(said["loss"]) for said in metrics]).all()


@every_row
def test_04_every_param_gets_a_gradient(name):
    _, after, _ = one_step(name, 1, 1, 1)
    size = {
        path_of(keys): np.abs(grad).max()
        for keys, grad in jax.tree_util.tree_leaves_with_path(after.opt_state)
    }
    still = {path for path, most in size.items() if most <= 1e-5 * max(size.values())}
    assert still == set(ROWS[name].still)


@every_row
def test_05_loss_falls_on_a_fixed_batch(name):
    (step, start), losses = recorded(name, 1, 8, 1), []
    state = start()
    for _ in range(25):
        state, said = step(state)
        losses.append(float(said["loss"]))
    assert np.mean(losses[-5:]) < ROWS[name].falls * losses[0]


@every_split
def test_06_eight_devices_agree_with_one(name, shape):
    start, here, said = one_step(name, *shape)
    _, there, expected = one_step(name, 1, 1, 1)
    assert worst(said, expected) < 1e-5  # loss, metrics
    for some, expected in (
        (here.opt_state, there.opt_state),  # gradients
        (here.buffers, there.buffers),  # statistics, targets
        (here.params, there.params),
    ):
        assert worst(moving(name, some), moving(name, expected)) < 1e-5
    assert worst(here.params, start.params) > 1e-4  # and it did move


@every_row
def test_06_eight_devices_draw_the_same_params(name):
    state = state_of.fresh_state(config_of(ROWS[name]), mesh_of(2, 2, 2))
    assert worst(state.params, fresh(name).params) < 1e-6


@every_split
def test_06_params_are_cut(name, shape):
    """What a device holds of params and moments is what the rules say, and far from all."""
    _, state, _ = one_step(name, *shape)
    config = config_of(ROWS[name], optimizer=Record())
    abstract = state_of.abstract_state(config, mesh_of(*shape))
    for x, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert x.sharding.is_equivalent_to(expected.sharding, x.ndim)
    for tree in (state.params, state.opt_state):
        held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(tree))
        whole = sum(x.size for x in jax.tree.leaves(tree))
        ways = shape[1] if name == "Follow" else shape[1] * shape[2]  # names no axes: fsdp alone
        assert 1 / ways <= held / whole < 1 / ways + 0.1


@every_row
def test_07_a_prepared_state_can_be_donated(name):
    states, *_ = trained(name)
    for state in states[:-1]:
        kept = [
            path_of(keys)
            for keys, x in jax.tree_util.tree_leaves_with_path(state)
            if not x.is_deleted()
        ]
        assert kept == []


@every_row
def test_08_the_objective_is_a_value(name):
    objective = ROWS[name].objective
    copy = replace(objective)
    assert copy == objective and hash(copy) == hash(objective)
    assert repr(copy) == repr(objective) and " at 0x" not in repr(objective)
    assert list(lines(copy)) == list(lines(objective))
    for field in fields(objective):
        value = getattr(objective, field.name)
        if isinstance(value, int | float):
            other = replace(objective, **{field.name: not value if value is True else value + 1})
            assert other != objective and list(lines(other)) != list(lines(objective))


@every_row
def test_09_encoders_give_tokens_of_each_example_alone(name):
    row = ROWS[name]
    before, _, _ = one_step(name, 1, 1, 1)
    x, y = (one_view(row.batch(seed)) for seed in (0, 1))
    mixed = jax.tree.map(lambda x, y: np.concatenate([x[:1], y[1:]]), x, y)
    back = jax.tree.map(lambda x: x[::-1], x)
    encode = jax.jit(lambda encoder, batch: encoder(batch))
    for encoder in row.objective.encoders(before.params, before.buffers).values():
        tokens, real = encode(encoder, x)
        assert tokens.ndim == 3 and real.shape == tokens.shape[:2] and len(tokens) == BATCH
        assert relative(encode(encoder, mixed)[0][0], tokens[0]) < 1e-6
        assert relative(encode(encoder, back)[0][::-1], tokens) < 1e-6


@pytest.mark.parametrize("name, what", [(n, w) for n, row in ROWS.items() for w in row.reorders])
def test_10_reordering_changes_the_loss_as_the_paper_says(name, what):
    row, reorder = ROWS[name], ROWS[name].reorders[what]
    objective = reorder.objective or row.objective
    before, _, _ = one_step(name, 1, 1, 1)
    key, batch = jax.random.key(3), row.batch(0)

    @jax.jit
    def loss(batch):
        return objective.loss(before.params, before.buffers, batch, key, jnp.int32(0))[0]

    apart = relative(loss(reorder.change(batch)), loss(batch))
    assert apart < 1e-6 if reorder.same else apart > 1e-4


@every_row
def test_11_half_precision_keeps_what_matters_in_float32(name):
    """In bfloat16 every exp, log, rsqrt and sum, and what a softmax reads, is float32."""
    row = replace(ROWS[name], objective=half(ROWS[name].objective))
    for mesh in (contextlib.nullcontext(), jax.set_mesh(mesh_of(1, 8, 1))):
        with mesh:
            assert losses(jax.make_jaxpr(row.objective.loss)(*abstract(row))) == []

    def gradient(change=lambda params: params, **other):
        """(loss, gradient) of the first step on params that `change` has rounded."""
        step, start = recorded(name, 1, 1, 1, **other)
        after, said = step(replace(start(), params=change(start().params)))
        return jax.device_get((said["loss"], after.opt_state))

    def apart(grads):
        return optax.tree.norm(jax.tree.map(np.subtract, grads, exact)) / optax.tree.norm(exact)

    loss, exact = gradient()
    rough, grads = gradient(objective=row.objective)
    assert relative(rough, loss) < 2e-2
    # Params, activations and gradients are rounded; BatchNorm over 16 examples makes that large.
    rounding = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)  # noqa: E731
    _, rounded = gradient(jax.jit(functools.partial(jax.tree.map, rounding)))
    assert apart(grads) < max(2e-2, 3 * apart(rounded))


@every_row
def test_12_accumulated_is_the_whole_batch_or_refused(name):
    """Where masks do not depend on chance, loss, gradient and buffers are those of one batch."""
    row, shape, results = ROWS[name], (1, 4, 1), []
    fixed = [r.objective for r in row.reorders.values() if r.objective]
    row = replace(row, objective=(fixed or [row.objective])[0])
    if row.objective.coupling(one_step(name, 1, 1, 1)[0].buffers):
        with pytest.raises(ConfigError, match=r"accumulate=2 would change the loss.*or use accum"):
            state_of.abstract_state(config_of(row, accumulate=2), mesh_of(*shape))
        return
    for accumulate in (1, 2):
        step, start = recorded(name, *shape, objective=row.objective, accumulate=accumulate)
        results.append(step(start()))
    (whole, one), (summed, many) = results
    assert relative(many["loss"], one["loss"]) < 1e-6
    assert worst(moving(name, summed.opt_state), moving(name, whole.opt_state)) < 1e-5
    assert worst(summed.buffers, whole.buffers) < 1e-5


# ---- the step around an objective ----


def test_the_step_as_the_page_says_it():
    """Gradient descent by hand; then the target moves once, towards the params that moved."""
    row = ROWS["Follow"]
    before, after, said = one_step("Follow", 1, 1, 1)
    slope = jax.grad(lambda w: row.objective.loss({"w": w}, before.buffers, row.batch(0), 0, 0)[0])
    grad = slope(before.params["w"])
    assert worst(after.opt_state, {"w": grad}) < 1e-5
    assert worst(after.params, {"w": before.params["w"] - 0.1 * grad}) < 1e-6
    target = 0.9 * before.buffers["target"]["w"] + 0.1 * np.asarray(after.params["w"])
    assert worst(after.buffers["target"], {"w": target}) < 1e-6
    assert int(after.step) == 1 and int(after.buffers["seen"]) == BATCH
    assert relative(said["grad_norm"], np.linalg.norm(grad)) < 1e-5
    assert relative(said["learning_rate"], 0.1) < 1e-6


@dataclass(frozen=True)
class Watchful(Follow):
    """Keeps a moving mean of the pixels, which its first loss does not use."""

    share: float = 0.0

    def loss(self, params, buffers, batch, key, step):
        loss, (buffers, metrics) = super().loss(params, buffers, batch, key, step)
        mean = 0.9 * buffers["mean"] + 0.1 * batch["image"].mean(0).ravel()
        return loss, ({**buffers, "mean": mean}, metrics)


@dataclass(frozen=True)
class Clamped(Follow):
    """Weights stay between -0.1 and 0.1."""

    def update(self, params, buffers, step):
        return {"w": jnp.clip(params["w"], -0.1, 0.1)}, buffers


def test_an_update_may_set_params():
    row = replace(ROWS["Follow"], objective=Clamped())
    config, mesh = config_of(row, optimizer=Record()), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        state, batch = state_of.fresh_state(config, mesh), placed(row.batch(0), mesh)
        before = jax.device_get(state.params["w"])
        after, _ = engine.jitted_step(config, mesh)(state, batch)
    moved = before - 0.1 * np.asarray(after.opt_state["w"])
    assert np.abs(moved).max() > 0.2
    np.testing.assert_allclose(after.params["w"], np.clip(moved, -0.1, 0.1), atol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_step_is_that_of_the_whole_batch(parts):
    """Where no example knows of the others: the same loss, gradient, buffers and metrics' mean."""
    row = replace(ROWS["Follow"], objective=Watchful())
    results = []
    for accumulate in (1, parts):
        config = config_of(row, optimizer=Record(), accumulate=accumulate)
        mesh = mesh_of(1, 4, 1)
        with jax.set_mesh(mesh):
            state, batch = state_of.fresh_state(config, mesh), placed(row.batch(0), mesh)
            results.append(engine.jitted_step(config, mesh)(state, batch))
    (whole, said), (summed, told) = results
    assert worst(summed.opt_state, whole.opt_state) < 1e-5
    assert worst(summed.params, whole.params) < 1e-5
    assert relative(told["loss"], said["loss"]) < 1e-5
    assert int(summed.buffers["seen"]) == int(whole.buffers["seen"]) == BATCH
    # The target moved once; and a micro-batch is each parts-th example, in order.
    assert worst(summed.buffers["target"], whole.buffers["target"]) < 1e-5
    x = row.batch(0)["image"].reshape(BATCH, -1)
    assert worst(summed.buffers["mean"], 0.1 * x.mean(0)) < 1e-5
    before = state_of.fresh_state(config_of(row, optimizer=Record()), mesh_of(1, 1, 1))
    error = np.square(x @ (before.params["w"] - before.buffers["target"]["w"])).mean(1)
    worsts = [error[i::parts].max() for i in range(parts)]
    assert relative(told["worst"], np.mean(worsts)) < 1e-5


@dataclass(frozen=True)
class Weighed(Follow):
    """The mean over the pictures whose first pixel is above 0, with metrics of all kinds."""

    share: float = 0.0

    def loss(self, params, buffers, batch, key, step):
        x = batch["image"].reshape(len(batch["image"]), -1)
        counts = x[:, 0] > 0
        error = (counts * jnp.square(x @ params["w"]).mean(1)).sum() / counts.sum()  # maybe 0 / 0
        most = jnp.bfloat16(x.max())
        metrics = {"weight": counts.sum(), "some": counts.any(), "size": len(x), "most": most}
        return error, (buffers, metrics)


def test_micro_batches_count_by_their_weight():
    """Those of weight 0 for nothing; and metrics of any dtype are averaged."""
    row = replace(ROWS["Follow"], objective=Weighed())
    image = np.abs(row.batch(0)["image"]) + 0.1
    image[1::2, 0, 0, 0] *= -1  # all of the second micro-batch of 2, and the 2nd and 4th of 4
    results = []
    with jax.set_mesh(mesh := mesh_of(1, 1, 1)):
        for accumulate in (1, 2, 4):
            config = config_of(row, optimizer=Record(), accumulate=accumulate)
            state = state_of.fresh_state(config, mesh)
            step = engine.jitted_step(config, mesh)
            results.append(step(state, placed({"image": image}, mesh)))
    (whole, one), *others = results
    for summed, many in others:
        assert relative(many["loss"], one["loss"]) < 1e-6
        assert worst(summed.opt_state, whole.opt_state) < 1e-6
        assert float(many["some"]) == 1.0 and np.isfinite(float(many["most"]))


@dataclass(frozen=True)
class Noise:
    """A view that is random numbers alone."""

    def __call__(self, key, batch):
        return {"image": jax.random.normal(key, batch["image"].shape)}


def test_every_step_and_micro_batch_has_views_of_its_own():
    """A step's views draw from fold_in(fold_in(root, step), 0), the next micro-batch's from 2."""
    row = replace(ROWS["Follow"], objective=Follow(share=0.0))
    config = config_of(row, optimizer=Record(), accumulate=2, views=Views(Noise(), Noise()))
    losses = []
    with jax.set_mesh(mesh := mesh_of(1, 1, 1)):
        state, batch = state_of.fresh_state(config, mesh), placed(row.batch(0), mesh)
        shape, root = (BATCH // 2, *batch["image"].shape[1:]), jnp.copy(state.key)
        step = engine.jitted_step(config, mesh)
        for number in range(2):
            w, target = jax.device_get((state.params["w"], state.buffers["target"]["w"]))
            state, metrics = step(state, batch)
            key, parts = jax.random.fold_in(root, number), []
            for n in (0, 2):
                x = np.asarray(jax.random.normal(jax.random.fold_in(key, n), shape))
                parts.append(np.square(x.reshape(BATCH // 2, -1) @ (w - target)).mean())
            assert relative(metrics["loss"], np.mean(parts)) < 1e-5
            losses += parts
    assert abs(losses[0] - losses[1]) > 1e-3


def test_accumulation_must_divide_the_batch():
    with pytest.raises(ConfigError, match="batch_size=16 does not divide into accumulate=3"):
        config_of(ROWS["Follow"], accumulate=3)


@dataclass(frozen=True)
class Fragile(Follow):
    """Adds the norm of what a pixel above 100 makes a zero vector: finite, but its slope is not."""

    def loss(self, params, buffers, batch, key, step):
        loss, aux = super().loss(params, buffers, batch, key, step)
        return loss + jnp.linalg.norm(params["w"] * (batch["image"].max() < 100)), aux


@pytest.mark.parametrize("pixel", [np.nan, 101.0], ids=["loss", "gradient alone"])
@pytest.mark.parametrize("nonfinite", ["skip", "stop"])
def test_nonfinite_step(nonfinite, pixel):
    """skip: params, optimizer and buffers bit-equal, steps counted on; stop: it is the loop's."""
    row, mesh = replace(ROWS["Follow"], objective=Fragile()), mesh_of(1, 2, 1)
    config = config_of(row, nonfinite=nonfinite)
    bad = {"image": row.batch(0)["image"].copy()}
    bad["image"][3, 0, 0, 0] = pixel
    with jax.set_mesh(mesh):
        good, bad = placed(row.batch(0), mesh), placed(bad, mesh)
        state, step = state_of.fresh_state(config, mesh), engine.jitted_step(config, mesh)
        state, first = step(state, good)
        before = jax.device_get((state.params, state.opt_state, state.buffers))
        state, second = step(state, bad)
        after = jax.device_get((state.params, state.opt_state, state.buffers))
        assert int(state.step) == 2
        assert np.isfinite(second["loss"]) == np.isfinite(pixel)
        assert not np.isfinite(second["grad_norm"])
        if nonfinite == "stop":
            assert "skipped" not in second and not np.isfinite(after[0]["w"]).all()
            return
        jax.tree.map(np.testing.assert_array_equal, after, before)
        state, third = step(state, good)
        assert [int(said["skipped"]) for said in (first, second, third)] == [0, 1, 0]
        assert worst(jax.device_get(state.params), before[0]) > 1e-4
