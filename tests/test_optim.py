"""Every optimizer over several steps against its published loop in float64; masks by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sslx import optim
from sslx.ops.trees import matching
from sslx.optim import LAMB, LARS, SGD, AdamW, ClassicLARS, ClippedLARS
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
