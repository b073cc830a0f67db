"""ResNet equals transformers' in outputs, gradients and statistics; BatchNorm against float64."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from sslx.export import keymaps
from sslx.export.architectures.resnet import counts, hf_resnet
from sslx.models.layers import BatchNorm, Conv, Scaling
from sslx.models.resnet import (
    BASIC,
    BOTTLENECK,
    CIFAR_STEM,
    IMAGENET_STEM,
    VARIANTS,
    ResNet,
    Stem,
    resnet,
)
from sslx.objectives import base
from sslx.sharding import Mesh, batch_sharding, shardings

TINY = (ResNet(BASIC, (1, 2), 8), ResNet(BOTTLENECK, (1, 1), 8))


def shapes(net, side=(32, 32), channels=3):
    image = jax.ShapeDtypeStruct((2, *side, channels), jnp.float32)
    return nn.unbox(jax.eval_shape(net.init, jax.random.key(0), image))


def varied(net, seed=0, channels=3):
    """Variables with nothing at zero or one, and activations of moderate size."""
    r = np.random.default_rng(seed)

    def drawn(path, x):
        if path.endswith("kernel"):
            return r.normal(0, np.sqrt(2 / np.prod(x.shape[:3])), x.shape)
        if path.endswith(("scale", "var")):
            return r.uniform(0.5, 1.5, x.shape)
        return r.normal(0, 0.3, x.shape)  # bias, mean

    flat = flatten_dict(shapes(net, channels=channels), sep="/")
    values = {path: drawn(path, x).astype(np.float32) for path, x in flat.items()}
    return unflatten_dict(values, sep="/")


def pictures(batch, height, width, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, height, width, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def transformers():
    reason = "NOT CHECKED: that ResNet equals transformers' (pip install sslx[hf])"
    pytest.importorskip("torch", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


def theirs(transformers, net, variables):
    """transformers' model with our weights, in float64."""
    import torch

    four = 4 if net.kernels == BOTTLENECK else 1
    config = transformers.ResNetConfig(
        embedding_size=net.channels,
        hidden_sizes=[net.channels * 2**i * four for i in range(len(net.blocks))],
        depths=list(net.blocks),
        layer_type="bottleneck" if four == 4 else "basic",
    )
    model = transformers.ResNetModel(config)
    arrays = keymaps.named_arrays(hf_resnet(net), variables, {})
    arrays |= counts(arrays)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    model.load_state_dict(tensors, strict=True)
    return model.double()


def seen_by_torch(image):
    import torch

    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2))).double()


def tokens_of(output):
    return output.last_hidden_state.detach().flatten(2).transpose(1, 2).numpy()


def near(ours, expected, share=1e-5):
    """Equal to `share` of the largest expected value."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("depth", [18, 50])
def test_outputs_and_statistics_are_transformers(transformers, depth):
    import torch

    net, image = resnet(depth), pictures(4, 65, 97)
    variables = varied(net)
    model = theirs(transformers, net, variables)
    with torch.no_grad():
        expected = tokens_of(model.eval()(seen_by_torch(image)))
    ours = np.asarray(jax.jit(net.apply)(variables, image))
    assert ours.shape == (4, 3 * 4, net.width)
    near(ours, expected)

    # In training: torch keeps the variance over n - 1, we that over n.
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            count = lambda _, x, name=name: counts.update({name: x[0].numel() // x[0].shape[1]})  # noqa: E731
            module.register_forward_pre_hook(count)
    single = copy.deepcopy(model).float().train()
    with torch.no_grad():
        expected = tokens_of(model.train()(seen_by_torch(image)))
        rounded = tokens_of(single(seen_by_torch(image).float()))
    # 53 normalizations by few values amplify float32's rounding: torch's own is 5e-5 in ResNet-50.
    room = max(1e-5, 2 * np.abs(rounded - expected).max() / np.abs(expected).max())
    step = jax.jit(lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"]))
    ours, moved = step(variables, image)
    near(ours, expected, room)
    stats = keymaps.named_arrays(
        tuple(row for row in hf_resnet(net) if row[0].startswith("batch_stats")), moved, {}
    )
    before = keymaps.named_arrays(hf_resnet(net), variables, {})
    after = {name: x.numpy() for name, x in model.state_dict().items()}
    assert len(stats) == 2 * len(counts)
    for name, n in counts.items():
        near(stats[f"{name}.running_mean"], after[f"{name}.running_mean"], room)
        name = f"{name}.running_var"
        biased = 0.9 * before[name] + (after[name] - 0.9 * before[name]) * (n - 1) / n
        near(stats[name], biased, room)


@pytest.mark.parametrize("net", TINY)
def test_gradients_are_transformers(transformers, net):
    image, variables = pictures(4, 33, 47), varied(net)
    weight = np.random.default_rng(2).normal(size=(4, 5 * 6, net.width)).astype(np.float32)
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}

    def loss(params, image, stats=jax.tree.map(jnp.asarray, stats)):
        tokens, _ = base.apply(net, params, stats, image)
        return (tokens * weight).sum()

    of_params, of_image = jax.jit(jax.grad(loss, (0, 1)))(params, image)
    model, seen = theirs(transformers, net, variables).train(), seen_by_torch(image)
    seen.requires_grad_(True)
    tokens = model(seen).last_hidden_state.flatten(2).transpose(1, 2)
    (tokens * tokens.new_tensor(weight)).sum().backward()
    near(of_image, seen.grad.numpy().transpose(0, 2, 3, 1))
    table = tuple(row for row in hf_resnet(net) if row[0].startswith("params"))
    ours = keymaps.named_arrays(table, {"params": of_params}, {})
    for name, parameter in model.named_parameters():
        near(ours[name], parameter.grad.numpy())


@pytest.mark.parametrize("side", [(32, 32), (33, 31), (7, 5)])
def test_stems_shape_the_tokens(side):
    """Sides after each stride of two are rounded up, torch's floor((n + 2p - k) / 2) + 1."""
    tokens = lambda net: jax.eval_shape(net.apply, shapes(net), jnp.zeros((2, *side, 3)))  # noqa: E731
    up = lambda n, times: up(-(-n // 2), times - 1) if times else n  # noqa: E731
    for stem, halvings in ((IMAGENET_STEM, 5), (CIFAR_STEM, 3)):
        count = up(side[0], halvings) * up(side[1], halvings)
        assert tokens(resnet(18, stem=stem)).shape == (2, count, 512)
    wide = resnet("mu", stem=Stem(3, 1, 2, pool=False))  # solo-learn's padding: two pixels more
    assert tokens(wide).shape == (2, up(side[0] + 2, 1) * up(side[1] + 2, 1), wide.width)


# torchvision's published counts less the classifier; arXiv:2002.05709, table 6 in millions.
@pytest.mark.parametrize(
    ("net", "count"),
    [
        (resnet(18), 11_689_512 - 513_000),
        (resnet(34), 21_797_672 - 513_000),
        (resnet(50), 25_557_032 - 2_049_000),
        (resnet(101), 44_549_160 - 2_049_000),
        (resnet(152), 60_192_808 - 2_049_000),
    ],
)
def test_params_count_as_published(net, count):
    assert sum(x.size for x in jax.tree.leaves(shapes(net)["params"])) == count


def test_width_multiplies_every_channel():
    params = shapes(resnet(50, width=2))["params"]
    assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6) == 94  # SimCLR's table 1
    assert resnet(50, width=2).width == 4096


def test_unknown_depth_names_the_known():
    with pytest.raises(ValueError, match="No ResNet of depth 20: choose one of mu, 18, 34, 50"):
        resnet(20)
    assert set(VARIANTS) == {"mu", "18", "34", "50", "101", "152"}


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_last_gamma_of_every_block(gamma):
    net = resnet("mu", last_gamma=gamma)
    params, stats = base.init(net, jax.random.key(0), jnp.asarray(pictures(2, 32, 32)))
    flat = flatten_dict(nn.unbox(params), sep="/")
    for path, x in flat.items():
        if path.endswith("scale"):
            assert np.all(x == (gamma if "norm2" in path else 1)), path
    for path, x in flatten_dict(stats, sep="/").items():
        assert np.all(x == path.endswith("var")), path  # init leaves mean 0 and variance 1


@pytest.mark.parametrize(
    ("scaling", "variance"),
    [
        (Scaling(2.0, "fan_out", "normal"), 2 / (9 * 64)),
        (Scaling(1.0, "fan_in", "normal"), 1 / 288),
    ],
)
def test_kernels_start_with_their_variance(scaling, variance):
    conv = Conv(64, 3, kernel_init=scaling)
    kernel = nn.unbox(conv.init(jax.random.key(0), jnp.zeros((1, 4, 4, 32))))["params"]["kernel"]
    assert kernel.shape == (3, 3, 32, 64)
    # 18,432 draws: their variance is known to about one percent
    np.testing.assert_allclose(np.var(kernel), variance, rtol=0.05)
    assert scaling == Scaling(scaling.scale, scaling.mode, "normal") and hash(scaling)


def test_bfloat16_computes_and_float32_keeps():
    net = resnet("mu", dtype=jnp.bfloat16)
    image = jnp.asarray(pictures(4, 32, 32))
    params, stats = base.init(net, jax.random.key(0), image)
    tokens, moved = base.apply(net, nn.unbox(params), stats, image)
    assert tokens.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves((params, moved))} == {jnp.dtype(jnp.float32)}


# ---- BatchNorm ----


def expected_norm(x, scale, bias, epsilon=1e-5):
    x = np.asarray(x, np.float64)
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias, mean, var


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5, 7)])
def test_batch_norm_is_its_definition(shape):
    r = np.random.default_rng(0)
    x = r.normal(2, 3, shape).astype(np.float32)
    scale, bias, mean, var = r.uniform(0.5, 2, (4, shape[-1])).astype(np.float32)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    norm = BatchNorm(momentum=0.8, epsilon=1e-3)
    step = jax.jit(lambda v, x: norm.apply(v, x, train=True, mutable=["batch_stats"]))
    y, moved = step(variables, x)
    out, mean_, var_ = expected_norm(x, scale, bias, 1e-3)
    near(y, out)
    near(moved["batch_stats"]["mean"], 0.8 * mean + 0.2 * mean_)
    near(moved["batch_stats"]["var"], 0.8 * var + 0.2 * var_)
    still = (x.astype(np.float64) - mean) / np.sqrt(var + np.float64(1e-3)) * scale + bias
    near(jax.jit(norm.apply)(variables, x), still)


@pytest.mark.parametrize(("scale", "bias"), [(False, False), (True, False), (False, True)])
def test_batch_norm_without_scale_or_bias(scale, bias):
    """SimCLR's last norm has no bias, MAE's linear probe has neither."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    norm = BatchNorm(use_scale=scale, use_bias=bias)
    variables = norm.init(jax.random.key(0), x, train=True)
    params, stats = variables.pop("params", {}), variables
    assert list(params) == ["scale"] * scale + ["bias"] * bias
    near(base.apply(norm, params, stats, x)[0], expected_norm(x, 1, 0)[0])


def test_variance_beside_a_large_mean():
    """One pass would lose it: float32 has no digits of 1 left beside 4096^2."""
    x = jnp.asarray(np.random.default_rng(0).normal(4096, 1, (512, 3)), jnp.float32)
    norm = BatchNorm(momentum=0.0, use_scale=False, use_bias=False)
    stats = norm.init(jax.random.key(0), x, train=True)
    y, moved = jax.jit(lambda x: base.apply(norm, {}, stats, x))(x)
    expected, mean, var = expected_norm(x, 1, 0)
    # the mean itself is rounded to 2^-12, an error of 1e-4 in y but not in the variance
    np.testing.assert_allclose(y, expected, rtol=0, atol=5e-4)
    near(moved["batch_stats"]["mean"], mean, 1e-6)
    near(moved["batch_stats"]["var"], var, 1e-6)


def test_what_is_kept_does_not_change_training():
    x = np.random.default_rng(0).normal(1, 1, (64, 3)).astype(np.float32)
    norm = BatchNorm(use_scale=False, use_bias=False)
    for mean in (0.0, 1.0, -5.0):
        stats = {"mean": jnp.full(3, mean), "var": jnp.full(3, 7.0)}
        loss = lambda x, s=stats: (base.apply(norm, {}, {"batch_stats": s}, x)[0] ** 3).sum()  # noqa: E731
        value, grad = jax.value_and_grad(loss)(jnp.asarray(x))
        y, _, var = expected_norm(x, 1, 0)
        # d/dx of sum(y^3), by hand: (3y^2 - mean(3y^2) - y mean(3y^3)) / std
        slope = 3 * y**2
        slope = (slope - slope.mean(0) - y * (slope * y).mean(0)) / np.sqrt(var + 1e-5)
        near(grad, slope)
        np.testing.assert_allclose(value, (y**3).sum(), rtol=1e-4)


def test_one_value_per_channel_cannot_train():
    norm = BatchNorm()
    with pytest.raises(ValueError, match=r"trains on \[1, 5\], one value.*batch of two"):
        base.init(norm, jax.random.key(0), jnp.ones((1, 5)))
    params, stats = base.init(norm, jax.random.key(0), jnp.ones((1, 2, 2, 5)))  # has positions
    norm.apply({"params": params, **stats}, jnp.ones((1, 5)))  # nor is it a fault in evaluation
    deep = ResNet(BASIC, (1, 1, 1, 1), 8)
    with pytest.raises(ValueError, match=r"trains on \[1, 1, 1, 64\]"):
        jax.eval_shape(lambda x: base.init(deep, jax.random.key(0), x), jnp.ones((1, 32, 32, 3)))


def test_statistics_are_of_the_global_batch():
    """Eight devices, each with two unlike examples, give one device's output and statistics."""
    net = resnet("mu", stem=CIFAR_STEM)
    image = pictures(16, 16, 16) * np.arange(1, 17, dtype=np.float32)[:, None, None, None]
    fresh = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((2, 16, 16, 3))))
    variables = varied(net)
    step = lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"])  # noqa: E731
    alone = jax.jit(step)(variables, image)
    mesh = Mesh(replica=2, fsdp=4).build()
    where = shardings(fresh, mesh)
    assert where["params"]["stage1_block1"]["conv1"]["kernel"].spec == P(None, None, None, "fsdp")
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, where), jax.device_put(image, batch_sharding(mesh))
        jax.tree.map(near, jax.jit(step)(*placed), alone)
