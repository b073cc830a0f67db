"""Every optimizer over several steps against its published loop in float64; masks by path."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tiny
from contract import mesh_of
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sslx import engine, optim
from sslx import state as states
from sslx.checkpoint import CheckpointError, Checkpoints, digest
from sslx.config import override, printed
from sslx.groups import Delayed, Frozen, Group, Grouped
from sslx.ops.bits import rounded
from sslx.ops.trees import matching
from sslx.optim import LAMB, LARS, SGD, AdamW, BERTAdam, ClassicLARS, ClippedLARS
from sslx.schedules import Constant, Cosine, Warmup

STEPS = 6
RATE = Warmup(3, Cosine(0.4, 0.1, 5))
# zero: a param that starts at zero, so that its first trust ratio is 1
SHAPES = {"conv/kernel": (3, 3, 2, 4), "dense/kernel": (5, 3), "dense/bias": (3,), "zero": (2, 2)}
PLAIN = r".*/bias"


def drawn(seed, shapes=SHAPES):
    r = np.random.default_rng(seed)
    flat = {p: r.normal(0, 1, s).astype(np.float32) * (p != "zero") for p, s in shapes.items()}
    return flat


def gradients(shapes=SHAPES):
    r = np.random.default_rng(7)
    return [{p: r.normal(0, 2, s).astype(np.float32) for p, s in shapes.items()} for _ in range(9)]


def nested(flat):
    return unflatten_dict(flat, sep="/")


def followed(optimizer, params, grads, stacked=""):
    """Params after every step of ours; those that match `stacked` are layers on axis 0."""
    params = jax.tree.map(jnp.asarray, nested(params))
    layers = jax.tree.map(lambda hit: 0 if hit else -1, matching(params, stacked))
    update = jax.jit(lambda *of: optimizer.update(*of, layers))
    state, out = optimizer.init(params), []
    for step, grad in enumerate(grads):
        updates, state = update(nested(grad), state, params, step)
        params = optax.apply_updates(params, updates)
        out.append(flatten_dict(params, sep="/"))
    return out


def same(ours, expected):
    for step, (a, b) in enumerate(zip(ours, expected, strict=True)):
        for path in b:
            np.testing.assert_allclose(a[path], b[path], rtol=2e-6, atol=2e-6, err_msg=f"{step}")


def rates(schedule=RATE):
    return [float(schedule(step)) for step in range(STEPS)]


def loop(rule, params, grads, schedule=RATE, **memory):
    """Params in float64 after every step of rule(path, param, grad, rate, memory) -> step."""
    params = {p: x.astype(np.float64) for p, x in params.items()}
    memory = {p: {name: np.zeros_like(x) for name in ("m", "v")} for p, x in params.items()}
    out = []
    for rate, grad in zip(rates(schedule), grads, strict=False):
        params = {
            p: x - rule(p, x, grad[p].astype(np.float64), rate, memory[p])
            for p, x in params.items()
        }
        out.append(params)
    return out


def length(x):
    return np.sqrt((x * x).sum())


def ratio(x, g, trust):
    return trust * length(x) / length(g) if length(x) and length(g) else 1.0


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
    def rule(path, x, g, rate, memory):
        g = g + (0.05 * x if not path.endswith("bias") else 0)
        memory["m"] = 0.8 * memory["m"] + g
        return rate * (g + 0.8 * memory["m"] if nesterov else memory["m"])

    ours = SGD(RATE, 0.8, nesterov, weight_decay=0.05, no_decay=PLAIN)
    params, grads = drawn(0), gradients()[:STEPS]
    same(followed(ours, params, grads), loop(rule, params, grads))


def test_sgd_is_torch():
    torch = pytest.importorskip("torch", reason="NOT CHECKED: that SGD is torch's")
    params, grads = drawn(0), gradients()[:STEPS]
    tensors = {p: torch.tensor(x, dtype=torch.float64) for p, x in params.items()}
    theirs = torch.optim.SGD(tensors.values(), 0.3, 0.9, weight_decay=0.05, nesterov=True)
    expected = []
    for grad in grads:
        for path, x in tensors.items():
            x.grad = torch.tensor(grad[path], dtype=torch.float64)
        theirs.step()
        expected.append({p: x.numpy().copy() for p, x in tensors.items()})
    ours = SGD(Constant(0.3), nesterov=True, weight_decay=0.05, no_decay="")
    same(followed(ours, params, grads), expected)


# What LARS leaves out may differ: here the zero param decays but has no rate, biases neither.
MASKS = {"no_decay": PLAIN, "no_trust": r".*/bias|zero"}


def lars(inside):
    def rule(path, x, g, rate, memory):
        if not path.endswith("bias"):
            g = g + 0.1 * x
            if path != "zero":
                g = ratio(x, g, 0.02) * g
        memory["m"] = 0.9 * memory["m"] + (rate * g if inside else g)
        return memory["m"] if inside else rate * memory["m"]

    return rule


@pytest.mark.parametrize(("form", "inside"), [(LARS, False), (ClassicLARS, True)])
def test_lars(form, inside):
    ours = form(RATE, trust=0.02, weight_decay=0.1, **MASKS)
    params, grads = drawn(0), gradients()[:STEPS]
    same(followed(ours, params, grads), loop(lars(inside), params, grads))


def test_the_forms_of_lars_differ_only_where_the_rate_does():
    params, grads = drawn(0), gradients()[:STEPS]
    for schedule, equal in ((Constant(0.3), True), (RATE, False)):
        one, other = (
            followed(form(schedule, no_decay=PLAIN, no_trust=PLAIN), params, grads)[-1]
            for form in (LARS, ClassicLARS)
        )
        apart = max(float(jnp.abs(one[p] - other[p]).max()) for p in one)
        assert (apart < 1e-6) == equal, apart


def test_classic_lars_is_optax():
    params, grads = drawn(0), gradients()[:STEPS]
    mask = nested({p: not p.endswith("bias") for p in SHAPES})
    theirs = optax.lars(RATE, 0.1, mask, 0.02, trust_ratio_mask=mask)

    class Theirs:
        init = staticmethod(theirs.init)

        def update(self, grads, state, params, step, layers):
            return theirs.update(grads, state, params)

    ours = ClassicLARS(RATE, trust=0.02, weight_decay=0.1, no_decay=PLAIN, no_trust=PLAIN)
    same(followed(ours, params, grads), followed(Theirs(), params, grads))


@pytest.mark.parametrize("trust", [0.02, 0.7])  # .7: some rates are clipped
def test_clipped_lars(trust):
    clips = set()

    def rule(path, x, g, rate, memory):
        if not path.endswith("bias") and length(x) and length(g):
            local = trust * length(x) / (length(g) + 0.1 * length(x) + 1e-8)
            clips.add(local > rate)
            g = (g + 0.1 * x) * min(local / rate, 1)
        memory["m"] = 0.9 * memory["m"] + g
        return rate * memory["m"]

    schedule = Cosine(0.4, 0.1, 5)
    ours = ClippedLARS(schedule, trust=trust, weight_decay=0.1, plain=PLAIN)
    params, grads = drawn(0), gradients()[:STEPS]
    same(followed(ours, params, grads), loop(rule, params, grads, schedule))
    assert clips == ({False} if trust == 0.02 else {False, True})


def test_clipped_lars_starts_at_a_rate_of_zero():
    params, grads = drawn(0), gradients()[:1]
    (after,) = followed(ClippedLARS(RATE, weight_decay=0.1, plain=PLAIN), params, grads)
    assert all(np.array_equal(after[p], params[p]) for p in params)


def test_lamb():
    steps = dict.fromkeys(SHAPES, 0)

    def rule(path, x, g, rate, memory):
        steps[path] += 1
        t = steps[path]
        memory["m"] = 0.9 * memory["m"] + 0.1 * g
        memory["v"] = 0.99 * memory["v"] + 0.01 * g * g
        u = memory["m"] / (1 - 0.9**t) / (np.sqrt(memory["v"] / (1 - 0.99**t)) + 1e-6)
        if not path.endswith("bias"):
            u = u + 0.1 * x
            u = ratio(x, u, 1.0) * u if path != "zero" else u
        return rate * u

    ours = LAMB(RATE, b2=0.99, weight_decay=0.1, **MASKS)
    params, grads = drawn(0), gradients()[:STEPS]
    same(followed(ours, params, grads), loop(rule, params, grads))


# ---- masks ----

LAYER = {"mlp/kernel": (4, 3), "mlp/bias": (3,)}


@pytest.mark.parametrize("form", [LARS, ClassicLARS, ClippedLARS, LAMB])
def test_stacked_layers_each_have_a_trust_ratio(form):
    """A scanned transformer's layers move as if each were an array of its own."""
    layers = [drawn(seed, LAYER) for seed in range(3)]
    sizes = 10.0 ** np.arange(3, dtype=np.float32)  # ratios far apart
    layers = [
        {p: x * size for p, x in layer.items()} for layer, size in zip(layers, sizes, strict=True)
    ]
    slopes = [[drawn(9 * i + j, LAYER) for j in range(3)] for i in range(1, 4)]  # step, layer

    def stacked(trees):
        return {f"blocks/{p}": np.stack([t[p] for t in trees]) for p in LAYER}

    optimizer = form(Constant(0.1), weight_decay=0.1)
    slopes_of_all = [stacked(trees) for trees in slopes]
    together = followed(optimizer, stacked(layers), slopes_of_all, stacked="blocks/.*")
    apart = [followed(optimizer, x, [s[i] for s in slopes]) for i, x in enumerate(layers)]
    for step, ours in enumerate(together):
        expected = stacked([layer[step] for layer in apart])
        for path, x in expected.items():
            np.testing.assert_allclose(ours[path], x, rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "field"),
    [
        (AdamW(RATE, weight_decay=0.1, no_decay="nothing"), "no_decay"),
        (SGD(RATE, weight_decay=0.1, no_decay="nothing"), "no_decay"),
        (LARS(RATE, weight_decay=0.1, no_decay="nothing"), "no_decay"),
        (LARS(RATE, no_trust="nothing"), "no_trust"),
        (ClassicLARS(RATE, no_trust="nothing"), "no_trust"),
        (ClippedLARS(RATE, plain="nothing"), "plain"),
        (LAMB(RATE, no_trust="nothing"), "no_trust"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(optimizer, field):
    with pytest.raises(ValueError, match=f"{field}='nothing' matches none of the 4.*{field}=''"):
        jax.eval_shape(optimizer.init, nested(drawn(0)))


def test_a_number_is_a_constant_rate():
    assert AdamW(0.5) == AdamW(Constant(0.5)) and AdamW(0.5).learning_rate(3) == 0.5


def test_params_in_boxes_have_their_own_names():
    """In a message too: a box is no part of a path."""
    params = {"w": nn.Partitioned(np.ones((2, 2), np.float32), ("embed", None))}
    with pytest.raises(ValueError, match=r"the 1 params, such as w: correct"):
        SGD(RATE, weight_decay=0.1).init(params)


@pytest.mark.parametrize("form", [AdamW, SGD])
def test_without_decay_no_pattern_has_to_match(form):
    params = {"w": np.ones((2, 2), np.float32)}
    (after,) = followed(form(Constant(0.1)), params, [params])
    assert np.all(after["w"] < 1)


@pytest.mark.parametrize("form", [AdamW, SGD, LARS, ClassicLARS, ClippedLARS, LAMB])
def test_optimizers_are_values(form):
    optimizer = form(RATE, weight_decay=0.1)
    assert optimizer == form(RATE, weight_decay=0.1) != form(RATE, weight_decay=0.2)
    assert hash(optimizer) == hash(form(RATE, weight_decay=0.1)) and "0x" not in repr(optimizer)


# ---- moments in bfloat16 ----

HALF = ml_dtypes.bfloat16
EVERY = [AdamW, BERTAdam, SGD, LARS, ClassicLARS, ClippedLARS, LAMB]


def neighbors(x):
    """The bfloat16 at or below every float32 in size, and the next larger one, from their bits."""
    low = (x.view(np.uint32) >> 16).astype(np.uint16)
    return low.view(HALF), (low + np.uint16(1)).view(HALF)


def test_rounding_at_random_is_right_on_average():
    """Each value becomes one of its two neighbors, the nearer one more often, by distance."""
    r = np.random.default_rng(0)
    sizes = 10.0 ** r.integers(-30, 30, 500)
    x = (r.normal(size=500) * sizes).astype(np.float32)
    x[:3] = 0, 1, -2.5  # exact: no two neighbors
    drawn = np.asarray(jax.jit(jax.vmap(rounded, (None, 0)))(x, np.arange(2000, dtype=np.uint32)))
    low, high = neighbors(x)
    assert drawn.dtype == HALF and ((drawn == low) | (drawn == high)).all()
    assert (drawn[:, :3] == x[:3].astype(HALF)).all()
    above = (x.astype(np.float64) - low.astype(np.float64)) / (
        high.astype(np.float64) - low.astype(np.float64)
    )
    off = (drawn == high).mean(0) - above
    deviation = np.sqrt(above * (1 - above) / 2000) + 1e-4
    assert np.abs(off / deviation).max() < 4.5 and 0.8 < (off / deviation)[3:].std() < 1.2
    often = (drawn == high)[:, (above > 0.1) & (above < 0.9)]  # what others do says nothing of it
    apart = np.corrcoef(often.T)[np.triu_indices(often.shape[1], 1)] * np.sqrt(2000)
    assert abs(apart.mean()) < 0.05 and apart.std() < 1.05 and np.abs(apart).max() < 5


def test_what_is_not_finite_is_not_rounded():
    """A NaN whose last bits are all ones would become -0, and so a diverged run a healthy one."""
    bits = np.asarray([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000], np.uint32)
    x = bits.view(np.float32)
    for seed in range(20):
        got = np.asarray(rounded(jnp.asarray(x), jnp.uint32(seed))).astype(np.float32)
        assert np.isnan(got[:3]).all() and (got[3:] == x[3:]).all()


def test_rounding_is_the_same_on_every_mesh():
    x = np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32)
    alone = np.asarray(jax.jit(rounded)(x, np.uint32(7)))
    mesh = mesh_of(2, 2, 2)
    for spec in (("tensor", ("replica", "fsdp"), None), (None, "fsdp", "tensor")):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        cut = jax.jit(rounded, out_shardings=where)(jax.device_put(x, where), np.uint32(7))
        assert np.asarray(cut).tobytes() == alone.tobytes()


def held(state):
    """The dtypes of an optimizer's arrays, without its counts."""
    return {x.dtype.name for x in jax.tree.leaves(state) if x.ndim}


@pytest.mark.parametrize("form", EVERY)
def test_moments_in_bfloat16(form):
    """The first step is that of float32, to the bit; later ones are as far off as a rounding."""
    params, grads = drawn(0), gradients()[:STEPS]
    wide, half = form(RATE), form(RATE, moments=jnp.bfloat16)
    assert held(wide.init(nested(params))) == {"float32"}
    assert held(half.init(nested(params))) == {"bfloat16"}
    one, other = followed(wide, params, grads), followed(half, params, grads)
    for path in SHAPES:
        np.testing.assert_array_equal(one[0][path], other[0][path])
        for before, a, b in zip(one[:-1], one[1:], other[1:], strict=True):
            most = np.abs(a[path] - before[path]).max()
            assert np.abs(a[path] - b[path]).max() < 0.03 * STEPS * most, path
    assert any((one[-1][p] != other[-1][p]).any() for p in SHAPES)


def test_a_second_moment_falls():
    """Where gradients shrink to a tenth; rounded to the nearest it would stay where it is."""
    steps, n = 1500, 4096
    adam = optim.stored(optax.scale_by_adam(0.9, 0.999), jnp.bfloat16)
    params = {"w": jnp.zeros(n)}
    grads = np.where(np.arange(steps) < 300, 1, 0.1).astype(np.float32)

    @jax.jit
    def run(state):
        def one(state, at):
            step, grad = at
            return adam.update({"w": jnp.full(n, grad)}, state, params, step=step)[1], None

        return jax.lax.scan(one, state, (jnp.arange(steps), grads))[0]

    square = np.asarray(run(adam.init(params)).nu["w"]).astype(np.float64)
    exact = nearest = 0.0
    for grad in grads.astype(np.float64):
        exact = 0.999 * exact + 0.001 * grad**2
        nearest = float(HALF(0.999 * nearest + 0.001 * grad**2))
    assert square.mean() == pytest.approx(exact, rel=0.01)
    assert 0.02 < square.std() / exact < 0.1  # what `stored` says of the noise
    assert nearest > 2 * exact  # so that what is tested for is there


def test_groups_with_moments_in_bfloat16():
    half = AdamW(RATE, moments=jnp.bfloat16)
    groups = (Group("conv/.*", Frozen()), Group("dense/bias", Delayed(half, 3)))
    state = Grouped(half, (*groups, Group("zero", AdamW(RATE)))).init(nested(drawn(0)))
    kinds = {i: {x.dtype.name for x in jax.tree.leaves(of) if x.ndim} for i, of in state.items()}
    assert kinds == {"0": set(), "1": {"bfloat16"}, "2": {"float32"}, "-1": {"bfloat16"}}


def test_a_run_with_moments_in_bfloat16(tmp_path):
    """They have the shardings of their params; resumed it is the same run, to the bit; and with
    moments of another dtype it is not that run."""
    wide = tiny.config()
    config = override(wide, "optimizer.moments", "bfloat16")
    assert "optimizer.moments = bfloat16\n" in printed(config)
    mesh = mesh_of(2, 2, 2)
    shapes = [states.abstract_state(c, mesh) for c in (config, wide)]
    half, other = (jax.tree.leaves(x.opt_state)[1:] for x in shapes)
    assert [(x.dtype, x.shape, x.sharding) for x in half] == [
        (jnp.bfloat16, x.shape, x.sharding) for x in other
    ]
    batch = {
        name: np.random.default_rng(0).integers(0, 255, x.shape).astype(x.dtype)
        for name, x in states.abstract_batch(config, mesh).items()
    }
    checkpoints = Checkpoints(tmp_path)
    with jax.set_mesh(mesh):
        step, now = engine.jitted_step(config, mesh), states.fresh_state(config, mesh)
        for i in range(4):
            if i == 2:
                checkpoints.save(2, now)
                checkpoints.wait()
            now, _ = step(now, batch)
        _, again = checkpoints.restore(shapes[0])
        for _ in range(2):
            again, _ = step(again, batch)
    assert digest(now) == digest(again)
    with pytest.raises(CheckpointError, match=r"is bfloat16\[.* on disk, float32\[.* here"):
        checkpoints.restore(shapes[1])
    checkpoints.close()


def test_moments_that_bfloat16_is_mistaken_for():
    with pytest.raises(ValueError, match="moments=float16: use float32 or bfloat16"):
        AdamW(RATE, moments=jnp.float16)


# ---- numbers ----


def test_the_linear_scaling_rule():
    assert optim.scaled(0.3, 4096) == pytest.approx(4.8)  # SimCLR, ImageNet


@pytest.mark.parametrize(("base", "steps"), [(0.996, 1000), (0.97, 12_500), (0.99, 312_000)])
def test_cosine_is_the_decay_of_byol(base, steps):
    """1 - (1 - tau_0) (cos(pi k / K) + 1) / 2, arXiv:2006.07733, section 3.3."""
    k = np.unique(np.linspace(0, steps, 101).astype(int))
    expected = 1 - (1 - base) * (np.cos(np.pi * k.astype(np.float64) / steps) + 1) / 2
    ours = [float(Cosine(base, 1.0, steps)(int(step))) for step in k]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1.3e-7)  # float32 near one
