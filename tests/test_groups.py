"""Groups of params against NumPy in float64, torch's optimizers, and the published layer decay."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from contract import ROWS, config_of, mesh_of, one_step
from flax.traverse_util import flatten_dict
from test_optim import PLAIN, RATE, STEPS, drawn, followed, gradients, length, loop, nested, same

from sslx import engine, state
from sslx.groups import ClippedEach, Delayed, Frozen, Group, Grouped, LayerWise
from sslx.optim import LARS, SGD, AdamW
from sslx.schedules import After, Constant, Linear, Times

ADAM = AdamW(RATE, b2=0.99, weight_decay=0.1, no_decay=PLAIN)


def adam(factor=lambda path: 1.0, start=lambda path: 0, decay=lambda step: 0.1):
    """AdamW in float64 whose arrays begin at a step, their moments and bias correction too."""
    steps = {}

    def rule(path, x, g, rate, memory):
        steps[path] = step = steps.get(path, -1) + 1
        if step < start(path):
            return 0 * x
        t = step - start(path) + 1
        memory["m"] = 0.9 * memory["m"] + 0.1 * g
        memory["v"] = 0.99 * memory["v"] + 0.01 * g * g
        u = memory["m"] / (1 - 0.9**t) / (np.sqrt(memory["v"] / (1 - 0.99**t)) + 1e-8)
        u = u + (0 if path.endswith("bias") else decay(step) * x)
        return factor(path) * rate * u

    return rule


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        (
            Grouped(ADAM, (Group("dense/.*", replace(ADAM, learning_rate=Times(10.0, RATE))),)),
            adam(factor=lambda path: 10.0 if path.startswith("dense") else 1.0),
        ),
        (
            Grouped(ADAM, (Group("conv/.*", Frozen()),)),
            adam(factor=lambda path: 0.0 if path.startswith("conv") else 1.0),
        ),
        (
            Grouped(ADAM, (Group("conv/.*|dense/bias", Delayed(ADAM, 3)),)),
            adam(start=lambda path: 3 if path in ("conv/kernel", "dense/bias") else 0),
        ),
        (
            replace(ADAM, weight_decay=Linear(0.1, 0.5, 4)),
            adam(decay=lambda step: 0.1 + 0.1 * min(step, 4)),
        ),
        (
            Grouped(ADAM, (Group("dense/kernel", Frozen()), Group("dense/.*", Delayed(ADAM, 2)))),
            adam(
                factor=lambda path: 0.0 if path == "dense/kernel" else 1.0,
                start=lambda path: 2 if path == "dense/bias" else 0,
            ),
        ),
    ],
    ids=[
        "ten times the rate",
        "frozen",
        "delayed",
        "a schedule of decay",
        "the first that matches",
    ],
)
def test_groups_of_adamw(optimizer, rule):
    params, grads = drawn(0), gradients()[:STEPS]
    same(followed(optimizer, params, grads), loop(rule, params, grads))


def test_a_param_that_torch_skips():
    """DINO's last layer: without a gradient for three steps, and decay that follows a schedule."""
    torch = pytest.importorskip("torch", reason="NOT CHECKED: that Delayed is torch's skipping")
    params, grads = drawn(0), gradients()
    tensors = {p: torch.tensor(x, dtype=torch.float64) for p, x in params.items()}
    theirs = torch.optim.AdamW(tensors.values(), 0.01)
    expected = []
    for step, grad in enumerate(grads):
        theirs.param_groups[0]["weight_decay"] = 0.04 + 0.04 * step
        for path, x in tensors.items():
            skipped = path.startswith("dense") and step < 3
            x.grad = None if skipped else torch.tensor(grad[path], dtype=torch.float64)
        theirs.step()
        expected.append({p: x.numpy().copy() for p, x in tensors.items()})
    adamw = AdamW(Constant(0.01), weight_decay=Linear(0.04, 0.4, 9), no_decay="")
    ours = Grouped(adamw, (Group("dense/.*", Delayed(adamw, 3)),))
    same(followed(ours, params, grads), expected)


def test_a_rate_of_zero_is_another_freezing():
    """DINOv2's: moments run while the rate is zero, so the first step is another one."""
    params, grads = drawn(0), gradients()[:STEPS]
    late = replace(ADAM, learning_rate=After(3, RATE))
    one, other = (
        followed(Grouped(ADAM, (Group("dense/.*", optimizer),)), params, grads)
        for optimizer in (late, Delayed(ADAM, 3))
    )
    for step in range(3):
        assert np.array_equal(one[step]["dense/kernel"], params["dense/kernel"])
    assert np.abs(one[3]["dense/kernel"] - other[3]["dense/kernel"]).max() > 1e-3
    expected = loop(adam(), params, grads)  # the moments are those of one that was never frozen
    step = one[3]["dense/bias"] - one[2]["dense/bias"]
    np.testing.assert_allclose(step, expected[3]["dense/bias"] - expected[2]["dense/bias"], 1e-4)


def test_what_is_frozen_has_no_moments():
    ours = Grouped(ADAM, (Group("conv/.*", Frozen()),))
    held = [x.shape for x in jax.tree.leaves(ours.init(nested(drawn(0))))]
    assert (3, 3, 2, 4) not in held and held.count((5, 3)) == 2


# ---- clipping ----


def clipped_by(norm, grads, groups):
    """Gradients of which the paths of each group together have at most that norm."""
    grads = dict(grads)
    for paths in groups:
        size = length(np.concatenate([grads[p].ravel() for p in paths]).astype(np.float64))
        grads |= {p: grads[p] * min(1, norm / size) for p in paths}
    return grads


@pytest.mark.parametrize("how", ["each", "of a group", "all"])
def test_clipping(how):
    sgd = SGD(RATE, 0.0, no_decay="")
    dense, rest = ["dense/kernel", "dense/bias"], ["conv/kernel", "zero"]
    ours, groups = {
        "each": (ClippedEach(sgd, 3.0), [[path] for path in dense + rest]),
        "of a group": (Grouped(ClippedEach(sgd, 1e9), (Group("dense/.*", SGDClipped),)), [dense]),
        "all": (
            Grouped(sgd, (Group("dense/kernel", Frozen()),), clip=3.0),
            [["dense/bias", *rest]],
        ),
    }[how]
    params, grads = drawn(0), gradients()[:STEPS]
    expected = loop(
        lambda path, x, g, rate, memory: 0 if how == "all" and path == "dense/kernel" else rate * g,
        params,
        [clipped_by(3.0, grad, groups) for grad in grads],
    )
    same(followed(ours, params, grads), expected)


SGDClipped = Grouped(SGD(RATE, 0.0, no_decay=""), (), clip=3.0)


def test_each_layer_of_a_scan_is_clipped_alone():
    grad = np.stack([np.full((4, 3), 10.0**i, np.float32) for i in range(3)])
    ours = ClippedEach(SGD(Constant(1.0), 0.0), 3.0)
    (after,) = followed(ours, {"blocks/w": 0 * grad}, [{"blocks/w": grad}], stacked="blocks/.*")
    sizes = [length(np.asarray(layer)) for layer in after["blocks/w"]]
    np.testing.assert_allclose(sizes, [3.0, 3.0, 3.0], rtol=1e-5)
    (after,) = followed(ours, {"blocks/w": 0 * grad}, [{"blocks/w": grad}])
    np.testing.assert_allclose(length(np.asarray(after["blocks/w"])), 3.0, rtol=1e-5)


# ---- depth ----


def test_layer_wise_decay_of_a_vit():
    """MAE's lr_decay.py on the params of a real ViT: 0 is the embedding, depth + 1 what follows."""
    config = config_of(ROWS["MAE"])
    mesh, depth, share = mesh_of(1, 1, 1), config.objective.encoder.depth, 0.65
    plain = SGD(Constant(1e-2), 0.0)
    wise = Grouped(LayerWise(plain, share), (Group("decoder/.*", plain),))
    config = replace(config, optimizer=wise)
    with jax.set_mesh(mesh):
        step, fresh = engine.jitted_step(config, mesh), state.fresh_state(config, mesh)
        after = jax.device_get(step(fresh, ROWS["MAE"].batch(0))[0].params)
    before, recorded, _ = one_step("MAE", 1, 1, 1)  # whose optimizer's state is the gradient
    trees = (before.params, recorded.opt_state, after)
    before, grads, after = (flatten_dict(tree, sep="/") for tree in trees)
    seen = set()
    for path, x in before.items():
        moved, scaled = -1e-2 * np.asarray(grads[path], np.float64), np.float64(after[path]) - x
        if path.startswith("encoder/transformer/blocks/"):
            ids = np.arange(depth) + 1.0
            factor = (share ** (depth + 1 - ids)).reshape(-1, *[1] * (x.ndim - 1))
        elif path.startswith("encoder/transformer/") or path.startswith("decoder"):
            factor = 1.0
        else:
            factor = share ** (depth + 1)
        seen.add(np.size(factor))
        np.testing.assert_allclose(scaled, factor * moved, atol=3e-7, err_msg=path)
    assert seen == {1, depth} and depth > 1


def test_layers_are_found_by_the_name_of_their_axis():
    """Norms too, and only what a scan has stacked."""
    for name, inside in (("MAE", "/blocks/"), ("MLM", "/blocks/"), ("SimCLR", "nothing")):
        layers = state.layers_of(config_of(ROWS[name]), jax.device_put(ROWS[name].batch(0)))
        flat = flatten_dict(layers, sep="/")
        assert {path for path, axis in flat.items() if axis == 0} == {
            path for path in flat if inside in path
        }
        assert set(flat.values()) <= {0, -1}


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (Grouped(ADAM, (Group("head/.*", Frozen()),)), r"groups.0.params='head/\.\*' matches none"),
        (Grouped(ADAM, (Group(".*", ADAM), Group("zero", Frozen()))), "put it first"),
        (Grouped(ADAM, (Group("[", Frozen()),)), r"groups.0.params='\[' is no regular expression"),
        (  # of the params of its group, the inner one freezes none
            Grouped(ADAM, (Group("dense/.*", Grouped(ADAM, (Group("conv/.*", Frozen()),))),)),
            "groups.0.params='conv/.*' matches none of the 2",
        ),
        (LayerWise(ADAM, 0.7), "embeddings=.* matches none"),
        (Grouped(replace(ADAM, no_decay="x"), ()), "no_decay='x' matches none of the 4"),
        (Grouped(ADAM, (Group("zero", LARS(RATE, no_trust="x")),)), "no_trust='x' matches none"),
    ],
)
def test_a_group_that_matches_nothing_is_an_error(optimizer, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(optimizer.init, nested(drawn(0)))


def test_layer_wise_decay_needs_layers():
    ours = LayerWise(ADAM, 0.7, embeddings="conv/.*")
    with pytest.raises(ValueError, match="no param has an axis named `layers`"):
        followed(ours, drawn(0), gradients()[:1])


def test_groups_are_values():
    ours = Grouped(ADAM, (Group("conv/.*", Delayed(ADAM, 3)),), clip=1.0)
    same_one = Grouped(ADAM, (Group("conv/.*", Delayed(ADAM, 3)),), clip=1.0)
    assert ours == same_one and hash(ours) == hash(same_one) and "0x" not in repr(ours)
    assert ours != Grouped(ADAM, (Group("conv/.*", Delayed(ADAM, 4)),), clip=1.0)


# ---- a whole method ----


def test_byol_with_a_last_layer_that_waits():
    """Three steps in which it rests to the bit, bias and decay too, and then moves; decay rises."""
    row = ROWS["BYOL"]
    adamw = AdamW(Constant(1e-3), weight_decay=Linear(0.04, 0.4, 10))
    last = r"predictor/.*"
    config = config_of(row, optimizer=Grouped(adamw, (Group(last, Delayed(adamw, 3)),)))
    mesh, batch = mesh_of(1, 2, 1), row.batch(0)
    with jax.set_mesh(mesh):
        now, step = state.fresh_state(config, mesh), engine.jitted_step(config, mesh)
        trace = [jax.device_get(now.params)]
        for _ in range(5):
            now, _ = step(now, batch)
            trace.append(jax.device_get(now.params))
    for i in range(5):
        before, after = (flatten_dict(tree, sep="/") for tree in trace[i : i + 2])
        rests = {path for path in before if np.array_equal(before[path], after[path])}
        waiting = {path for path in before if path.startswith("predictor/")}
        assert waiting and (rests == waiting if i < 3 else not rests & waiting), i
