"""What we compute equals what others do: transformers, torch, Pillow, float64 NumPy."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from exports import about
from flax import linen as nn
from flax.traverse_util import flatten_dict
from PIL import Image

from sslx.export import hf, keymaps
from sslx.export.architectures import vit as vit_tables
from sslx.models.layers import MLP, LayerNorm
from sslx.models.vit import ViT, vit
from sslx.objectives.mae import MAE, Decoder
from sslx.ops import image as ops
from sslx.ops.masks import kept, shuffle
from sslx.ops.positions import sincos_2d
from sslx.optim import AdamW
from sslx.schedules import Constant, Cosine, Warmup

REASON = "NOT CHECKED: parity of MAE's loss and gradients with torch (pip install sslx[hf])"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason=REASON)


@pytest.fixture
def transformers(torch):
    return pytest.importorskip("transformers", reason=REASON)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def random_params(objective, side, channels=3):
    """Params of the objective's shapes, without compiling its init."""
    batch = {"image": jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)}
    shapes, _ = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), batch))
    r = np.random.default_rng(0)
    return jax.tree.map(lambda x: r.normal(0.1, 0.1, x.shape).astype(np.float32), shapes)


# ---- MAE against transformers ----


@dataclass(frozen=True)
class Case:
    """An objective and the images that both implementations see."""

    objective: MAE
    side: int
    channels: int = 3
    examples: int = 3


CASES = {
    "paper": Case(MAE(ViT(48, 3, 4, 8), Decoder(32, 2, 4)), 32),
    "trap 18": Case(MAE(ViT(32, 2, 2, 4), Decoder(16, 1, 2, mlp_ratio=3.0), ratio=0.9), 40),
    "gray pixels": Case(
        MAE(vit("mu", 2), Decoder(32, 1, 8), ratio=0.3, normalize=False), 8, channels=1
    ),
    "Ti/16": Case(MAE(vit("Ti", 16), Decoder(64, 2, 4)), 224, examples=1),
}


def fill(torch, model, case):
    """Weights of which none hides, biases and norms far from zero and one; the loop's positions."""
    r, grid = torch.Generator().manual_seed(0), case.side // case.objective.encoder.patch
    for name, p in model.named_parameters():
        p.requires_grad = "pos" not in name  # transformers 5 loses the flag when it loads
        if not p.requires_grad:
            p.data[0, 1:] = torch.from_numpy(loop_table(grid, grid, p.shape[-1]))
        else:
            scale = 0.3 if p.ndim == 1 or "token" in name else 1.5 / math.sqrt(p[0].numel())
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.data = center + scale * torch.randn(p.shape, generator=r)


def theirs(torch, model, case, noise, image):
    """(loss, logits, mask) of the torch model; leaves the gradients in it."""
    seen = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    out = model(pixel_values=seen, noise=torch.from_numpy(noise))
    model.zero_grad()
    out.loss.backward()
    return out.loss.item(), out.logits.detach().numpy(), out.mask.numpy()


def ours(objective, params, key, image):
    """(loss, logits, mask, gradients), all patches in raster order."""

    @jax.jit
    def run(params):
        order, keep = objective.mask(key, image)
        logits = objective.predict(params, image, order, keep)
        raster = jnp.argsort(order, 1)
        logits = jnp.take_along_axis(logits, raster[..., None], 1)
        (loss, _), grads = jax.value_and_grad(objective.loss, has_aux=True)(
            params, {}, {"image": image}, key, jnp.int32(0)
        )
        return loss, logits, raster >= keep.shape[1], grads

    return jax.tree.map(np.asarray, run(params))


def gradients(model, directory):
    """The torch model's gradients as our tree: saved in place of its weights, and loaded."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.grad.clone()
    model.save_pretrained(directory)
    return hf.read(directory).params


def difference(a, b):
    """The largest difference, relative to the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", CASES)
def test_mae_equals_transformers(torch, transformers, name, tmp_path):
    case = CASES[name]
    objective = case.objective
    params = random_params(objective, case.side, case.channels)
    hf.save(objective, params, {}, tmp_path / "a", about(case.side))
    model = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "a").train()
    fill(torch, model, case)
    model.save_pretrained(tmp_path / "b")
    loaded = hf.read(tmp_path / "b")
    params = loaded.params
    fields = {path.removeprefix("objective."): part for path, part in loaded.parts.items()}
    assert MAE(**fields) == objective

    key, r = jax.random.key(1), np.random.default_rng(2)
    image = r.normal(size=(case.examples, case.side, case.side, case.channels)).astype(np.float32)
    patches = (case.side // objective.encoder.patch) ** 2
    noise = np.array(jax.random.uniform(key, (case.examples, patches)))  # what `shuffle` sorts
    loss, logits, mask = theirs(torch, model, case, noise, image)
    our_loss, our_logits, our_mask, grads = ours(objective, params, key, jnp.asarray(image))

    assert np.array_equal(mask, our_mask)
    worst = {"loss": difference(our_loss, loss), "logits": difference(our_logits, logits)}
    flat = flatten_dict(gradients(model, tmp_path / "c"), sep="/")
    assert len(flat) == len(jax.tree.leaves(params)) and all(g.any() for g in flat.values())
    for path, grad in flatten_dict(grads, sep="/").items():
        worst[path] = difference(grad, flat[path])
    at = max(worst, key=worst.get)
    print(f"loss {worst['loss']:.1e}, logits {worst['logits']:.1e}, at most {worst[at]:.1e}, {at}")
    assert worst[at] < 1e-4, at


# ---- MAE against float64 NumPy ----


def loop_table(rows, columns, width):
    """MAE's position table, one number at a time, in float64."""
    table = np.zeros((rows * columns, width))
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                rate = 1 / 10000 ** (i / quarter)
                cell = table[row * columns + column]
                cell[i], cell[quarter + i] = math.sin(column * rate), math.cos(column * rate)
                cell[2 * quarter + i] = math.sin(row * rate)
                cell[3 * quarter + i] = math.cos(row * rate)
    return table


@pytest.mark.parametrize(("rows", "columns", "width"), [(3, 5, 16), (14, 14, 192), (1, 7, 4)])
def test_positions(rows, columns, width):
    table = sincos_2d(rows, columns, width)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, loop_table(rows, columns, width), rtol=0, atol=1e-7)


def test_target_is_normalized_by_the_unbiased_variance():
    objective = CASES["paper"].objective
    image = np.random.default_rng(0).normal(2, 3, (2, 16, 24, 3)).astype(np.float32)
    target = np.asarray(objective.target(jnp.asarray(image)))
    assert target.shape == (2, 6, 192)
    for n, (row, column) in enumerate(np.ndindex(2, 3)):
        patch = image[1, 8 * row :, 8 * column :][:8, :8].astype(np.float64)
        mean = sum(patch.flat) / 192
        variance = sum((x - mean) ** 2 for x in patch.flat) / 191
        expected = ((patch - mean) / math.sqrt(variance + 1e-6)).ravel()
        np.testing.assert_allclose(target[1, n], expected, rtol=0, atol=1e-5)
    flat = objective.target(jnp.full((1, 8, 8, 3), 7.0))
    assert np.array_equal(flat, np.zeros((1, 1, 192)))


def test_layer_norm_epsilon():
    """On tokens so small that the epsilon is a good part of the variance."""
    r = np.random.default_rng(0)
    x, scale, bias = r.normal(size=(4, 32)) * 1e-3, r.normal(size=32), r.normal(size=32)
    variance = ((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6) * scale + bias
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    y = LayerNorm().apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_gelu_is_the_error_function_s():
    r = np.random.default_rng(0)
    x, up, down = r.normal(size=(2, 3, 8)), r.normal(size=(8, 32)), r.normal(size=(32, 8))
    hidden = x @ up
    expected = (hidden * scipy.special.ndtr(hidden)) @ down
    params = {"up": {"kernel": up, "bias": np.zeros(32)}}
    params |= {"down": {"kernel": down, "bias": np.zeros(8)}}
    y = MLP(4.0).apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x))
    np.testing.assert_allclose(y, expected, rtol=0, atol=5e-5)


def test_how_many_patches_are_kept():
    assert [kept(196, 0.75), kept(100, 0.9), kept(64, 0.75)] == [49, 9, 16]
    assert all(
        kept(n, r) == int(n * (1 - r)) for n in (49, 64, 196, 256) for r in (0.5, 0.6, 0.75, 0.9)
    )
    with pytest.raises(ValueError, match="leaves 0 visible"):
        kept(4, 0.9)


def test_every_order_is_a_fair_permutation():
    order = np.asarray(shuffle(jax.random.key(0), 4000, 6))
    assert np.array_equal(np.sort(order, 1), np.tile(np.arange(6), (4000, 1)))
    for place in range(6):  # 4000 draws of 6: chi-squared, 5 degrees of freedom
        assert scipy.stats.chisquare(np.bincount(order[:, place], minlength=6)).pvalue > 1e-4


def test_init_is_fairs():
    """xavier of the flat matrices (qkv as one), tokens normal .02, norms and biases at rest."""
    objective = MAE(ViT(768, 2, 12, 16), Decoder(512, 1, 16))
    batch = {"image": jnp.zeros((1, 32, 32, 3))}
    params, _ = jax.jit(objective.init)(jax.random.key(0), batch)
    flat = jax.tree.map(np.asarray, flatten_dict(nn.unbox(params), sep="/"))
    xavier = {
        "encoder/patch/kernel": (768, 768),
        "encoder/transformer/blocks/attention/qkv/kernel": (768, 3 * 768),
        "encoder/transformer/blocks/attention/out/kernel": (768, 768),
        "encoder/transformer/blocks/mlp/up/kernel": (768, 3072),
        "encoder/transformer/blocks/mlp/down/kernel": (3072, 768),
        "decoder/embed/kernel": (768, 512),
        "decoder/transformer/blocks/attention/qkv/kernel": (512, 3 * 512),
        "decoder/pixels/kernel": (512, 768),
    }
    for path, (fan_in, fan_out) in xavier.items():
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.999 < np.abs(flat[path]).max() / bound < 1.00001, path
        assert flat[path].std() == pytest.approx(bound / math.sqrt(3), rel=0.01), path
    assert flat["encoder/transformer/blocks/attention/qkv/kernel"].std() == pytest.approx(
        0.0255, abs=1e-4
    )
    for path in ("encoder/class", "decoder/mask"):
        assert flat[path].std() == pytest.approx(0.02, rel=0.15), path
    for path, x in flat.items():
        if path.endswith(("bias", "scale")):
            assert np.all(x == path.endswith("scale")), path
    for x in (x for path, x in flat.items() if "blocks" in path and path.endswith("kernel")):
        assert len(x) == 1 or not np.array_equal(x[0], x[1])  # every layer its own key


# ---- the recipe ----


def test_adamw_equals_torch(torch):
    """FAIR's two groups: what is one-dimensional or a bias, layer by layer, does not decay."""
    objective = MAE(vit("mu", 4), Decoder(16, 2, 2))
    params = random_params(objective, 16)
    of = {"encoder": vit_tables.sizes(objective.encoder, 4, 3)}
    of["decoder"] = vit_tables.sizes(objective.decoder, 4, 3, 32)

    def named(tree):
        both = (
            keymaps.named_arrays(table, tree[k], of[k]) for k, table in vit_tables.HF_MAE.items()
        )
        return {name: x for part in both for name, x in part.items()}

    tensors = {n: torch.nn.Parameter(torch.tensor(x)) for n, x in named(params).items()}
    groups = {True: [], False: []}
    for name, p in tensors.items():
        groups[not (p.ndim <= 1 or name.endswith(".bias"))].append(p)
    assert {"vit.embeddings.cls_token", "decoder.mask_token"} <= {
        n for n, p in tensors.items() if any(p is q for q in groups[True])
    }
    reference = torch.optim.AdamW(
        [{"params": ps, "weight_decay": 0.05 * decay} for decay, ps in groups.items()],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    optimizer = AdamW(Constant(1e-2), b2=0.95, weight_decay=0.05)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    r = np.random.default_rng(0)
    for step in range(5):
        grads = jax.tree.map(lambda x: r.normal(0, 0.01, x.shape).astype(np.float32), params)
        for name, grad in named(grads).items():
            tensors[name].grad = torch.from_numpy(grad)
        reference.step()
        moved, state = update(grads, state, params, step)
        params = jax.tree.map(lambda p, u: np.asarray(p + u), params, moved)
    for name, x in named(params).items():
        np.testing.assert_allclose(x, tensors[name].detach(), rtol=0, atol=1e-6, err_msg=name)


def test_schedule_is_fairs():
    """`adjust_learning_rate` of fractional epochs, at every step."""
    peak, warmup, epochs, per_epoch = 2.4e-3, 4, 20, 13
    schedule = Warmup(warmup * per_epoch, Cosine(peak, 1e-5, (epochs - warmup) * per_epoch))
    steps = np.arange(epochs * per_epoch)

    def fairs(epoch):
        if epoch < warmup:
            return peak * epoch / warmup
        share = (epoch - warmup) / (epochs - warmup)
        return 1e-5 + (peak - 1e-5) * 0.5 * (1.0 + math.cos(math.pi * share))

    expected = [fairs(step / per_epoch) for step in steps]
    np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, rtol=0, atol=1e-6 * peak)


# ---- images ----


def pillow(image, box, out):
    """Crop, then resize, bicubic; one channel at a time in float32 or all in uint8."""
    top, left, height, width = (int(x) for x in box)
    if image.dtype == np.uint8:
        cropped = Image.fromarray(image).crop((left, top, left + width, top + height))
        return np.asarray(cropped.resize((out, out), Image.Resampling.BICUBIC))
    planes = [Image.fromarray(plane) for plane in np.moveaxis(image, -1, 0)]
    planes = [p.crop((left, top, left + width, top + height)) for p in planes]
    planes = [np.asarray(p.resize((out, out), Image.Resampling.BICUBIC)) for p in planes]
    return np.clip(np.stack(planes, -1), 0, 1)


BOXES = {
    "whole": (0, 0, 50, 70),
    "corner": (37, 51, 13, 19),  # to the lower right edge
    "origin": (0, 0, 9, 33),
    "tall": (3, 60, 47, 8),
    "same size": (10, 20, 24, 24),
    "pixel": (49, 69, 1, 1),
    "inside": (11, 13, 21, 40),
}


@pytest.mark.parametrize("out", [24, 64])
def test_crop_and_resize_equal_pillows(out):
    r = np.random.default_rng(0)
    boxes = np.array(list(BOXES.values()), np.int32)
    image = r.uniform(size=(len(boxes), 50, 70, 3)).astype(np.float32)
    ours = np.asarray(jax.jit(ops.crop_resize, static_argnums=2)(image, boxes, out))
    for name, x, box, y in zip(BOXES, image, boxes, ours, strict=True):
        np.testing.assert_allclose(y, pillow(x, box, out), rtol=0, atol=3e-6, err_msg=name)
    gentle = r.integers(60, 196, image.shape).astype(np.uint8)  # Pillow clips between its passes
    ours = np.asarray(jax.jit(ops.crop_resize, static_argnums=2)(gentle / 255.0, boxes, out))
    for name, x, box, y in zip(BOXES, gentle, boxes, ours, strict=True):
        np.testing.assert_allclose(
            255 * y, pillow(x, box, out), rtol=0, atol=1.3, err_msg=name
        )  # two roundings to uint8


def torchvisions(r, height, width, scale, ratio):
    """`RandomResizedCrop.get_params`, with NumPy's generator."""
    for _ in range(10):
        area = height * width * r.uniform(*scale)
        aspect = math.exp(r.uniform(*np.log(ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return r.integers(0, height - h + 1), r.integers(0, width - w + 1), h, w
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ("extent", "scale"),
    [((32, 32), (0.2, 1.0)), ((100, 60), (0.08, 1.0)), ((40, 90), (0.5, 1.0))],
)
def test_random_boxes_are_distributed_as_torchvisions(extent, scale):
    draws, ratio, r = 8000, (3 / 4, 4 / 3), np.random.default_rng(0)
    extents = jnp.tile(jnp.asarray(extent, jnp.int32), (draws, 1))
    ours = np.asarray(jax.jit(ops.random_boxes, static_argnums=(2, 3))(
        jax.random.key(0), extents, scale, ratio
    ))  # fmt: skip
    theirs = np.array([torchvisions(r, *extent, scale, ratio) for _ in range(draws)])
    for boxes in (ours, theirs):
        assert boxes[:, :2].min() >= 0 and boxes[:, 2:].min() > 0
        assert np.all(boxes[:, :2] + boxes[:, 2:] <= extent)
    derived = [lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, :2].sum(1)]
    columns = [lambda b, i=i: b[:, i] for i in range(4)]
    for what in columns + derived:
        distance = scipy.stats.ks_2samp(what(ours), what(theirs)).statistic
        assert distance < 1.95 * math.sqrt(2 / draws)  # one in a thousand
    corners = (lambda b: b[:, 0] == 0), (lambda b: b[:, 0] + b[:, 2] == extent[0])
    for edge in corners:  # the last place is as likely as the first
        assert abs(edge(ours).mean() - edge(theirs).mean()) < 4 * math.sqrt(0.5 / draws)


@pytest.mark.parametrize(
    ("extent", "box"),
    [((10, 200), (0, 93, 10, 13)), ((200, 10), (93, 0, 13, 10)), ((7, 7), (0, 0, 7, 7))],
)
def test_a_box_that_never_fits_is_centered(extent, box):
    r, scale = np.random.default_rng(0), (1.0, 1.0) if extent == (7, 7) else (0.9, 1.0)
    ratio = (1.0, 1.0) if extent == (7, 7) else (3 / 4, 4 / 3)
    assert torchvisions(r, *extent, scale, ratio) == box
    boxes = ops.random_boxes(jax.random.key(0), jnp.array([extent] * 4), scale, ratio)
    assert np.array_equal(boxes, [box] * 4)
