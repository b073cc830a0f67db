"""Each image operation equals its definition, computed apart in float64 or by Pillow.

torchvision's changes of color are Pillow's, in its own 8 bits; the same are TensorFlow's and
DeepMind's where a name says so. The bicubic crop is in test_parity.py.
"""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from PIL import ImageEnhance, ImageOps

from sslx.ops import image as ops

B, H, W = 5, 14, 11
FACTORS = np.array([0.0, 0.3, 1.0, 1.4, 1.8])
TURNS = np.array([-0.5, -0.13, 0.0, 0.07, 0.4])
BYTES = np.random.default_rng(0).integers(0, 256, (B, H, W, 3))
BYTES = (BYTES * [1.0, 0.7, 0.4]).astype(np.uint8)  # a tint: channels differ in their means
BYTES[:, :2, :2] = BYTES[:, :2, :2, :1]  # gray pixels: hue is not defined
BYTES[:, 0, 0], BYTES[:, 0, 1] = 0, 255
BYTES[:, 3, :3] = [[200, 200, 30], [30, 200, 200], [200, 30, 200]]  # ties for the largest
IMAGE = BYTES / 255.0  # float64


def ours(op, *amount, image=IMAGE) -> np.ndarray:
    amount = [jnp.asarray(a, jnp.float32) if isinstance(a, np.ndarray) else a for a in amount]
    static = tuple(i + 1 for i, a in enumerate(amount) if not isinstance(a, jax.Array))
    image = jnp.asarray(image, jnp.float32)
    return np.asarray(jax.jit(op, static_argnums=static)(image, *amount))


def gray(image: np.ndarray) -> np.ndarray:
    return (image @ [0.2989, 0.587, 0.114])[..., None]


def blended(one, other, share: np.ndarray) -> np.ndarray:
    share = share[:, None, None, None]
    return np.clip(share * one + (1 - share) * other, 0, 1)


def through_hsv(change, amount: np.ndarray) -> np.ndarray:
    """`change` of (h, s, v) for every pixel, by Python's colorsys."""
    out = np.empty_like(IMAGE)
    for b, y, x in np.ndindex(IMAGE.shape[:3]):
        h, s, v = colorsys.rgb_to_hsv(*IMAGE[b, y, x])
        out[b, y, x] = colorsys.hsv_to_rgb(*change(h, s, v, amount[b]))
    return out


def mean(x: np.ndarray) -> np.ndarray:
    return x.mean((1, 2), keepdims=True)


DEFINED = {
    "brightness": (FACTORS, lambda a: blended(IMAGE, 0 * IMAGE, a)),
    "added_brightness": (TURNS, lambda a: np.clip(IMAGE + a[:, None, None, None], 0, 1)),
    "contrast": (FACTORS, lambda a: blended(IMAGE, mean(gray(IMAGE)), a)),
    "channel_contrast": (FACTORS, lambda a: blended(IMAGE, mean(IMAGE), a)),
    "saturation": (FACTORS, lambda a: blended(IMAGE, gray(IMAGE), a)),
    "hsv_saturation": (
        FACTORS,
        lambda a: through_hsv(lambda h, s, v, f: (h, min(s * f, 1.0), v), a),
    ),
    "hue": (TURNS, lambda a: through_hsv(lambda h, s, v, t: ((h + t) % 1.0, s, v), a)),
}


@pytest.mark.parametrize("name", DEFINED)
def test_color_is_as_defined(name):
    amount, expected = DEFINED[name]
    out = ours(getattr(ops, name), amount)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected(amount), atol=2e-6)


@pytest.mark.parametrize(
    ("op", "enhance"),
    [
        (ops.brightness, ImageEnhance.Brightness),
        (ops.contrast, ImageEnhance.Contrast),
        (ops.saturation, ImageEnhance.Color),
    ],
)
def test_color_is_pillows_up_to_its_rounding(op, enhance):
    pictures = [PIL.Image.fromarray(x) for x in BYTES]
    expected = [enhance(p).enhance(f) for p, f in zip(pictures, FACTORS, strict=True)]
    expected = np.stack([np.asarray(x) for x in expected]).astype(float)
    # gray and its mean are rounded to a byte each, and moved by |1 - factor|; so is the result
    assert np.abs(255 * ours(op, FACTORS) - expected).max() < 2.1


def test_the_two_forms_of_a_change_differ():
    for one, other in (("contrast", "channel_contrast"), ("saturation", "hsv_saturation")):
        assert (
            np.abs(ours(getattr(ops, one), FACTORS) - ours(getattr(ops, other), FACTORS)).max()
            > 0.1
        )


def test_nothing_leaves_the_range():
    """... so that operations may follow in any order, NaN being seen too."""
    for name, (amount, _) in DEFINED.items():
        out = ours(getattr(ops, name), amount)
        assert out.min() >= 0 and out.max() <= 1, name


def test_grayscale_is_pillows():
    expected = np.stack([np.asarray(PIL.Image.fromarray(x).convert("L")) for x in BYTES])
    out = ours(ops.grayscale)
    assert out.shape == IMAGE.shape and (out == out[..., :1]).all()
    assert np.abs(255 * out[..., 0] - expected).max() < 0.6


def test_solarize_is_pillows():
    expected = np.stack([np.asarray(ImageOps.solarize(PIL.Image.fromarray(x))) for x in BYTES])
    assert np.array_equal(np.rint(255 * ours(ops.solarize)), expected)
    darker = ours(ops.solarize, 0.2)
    np.testing.assert_allclose(darker, np.where(IMAGE < 0.2, IMAGE, 1 - IMAGE), atol=1e-6)


@pytest.mark.parametrize("padding", ["constant", "reflect"])
@pytest.mark.parametrize("size", [1, 3, 9])
def test_blur_is_a_gaussian_window(size, padding):
    """In two dimensions at once, as it is defined."""
    sigma, radius = np.array([0.1, 0.5, 1.0, 1.7, 2.0]), size // 2
    margin = ((0, 0), (radius, radius), (radius, radius), (0, 0))
    around = np.lib.stride_tricks.sliding_window_view(
        np.pad(IMAGE, margin, mode=padding), (size, size), axis=(1, 2)
    )  # [B, H, W, C, size, size]
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    weight = np.exp(-(x**2 + y**2) / (2 * sigma[:, None, None] ** 2))
    weight /= weight.sum((1, 2), keepdims=True)
    expected = np.einsum("bhwcij,bij->bhwc", around, weight)
    np.testing.assert_allclose(ours(ops.blur, sigma, size, padding), expected, atol=1e-6)


def test_blur_of_sigma_zero_is_exactly_the_image():
    out = ours(ops.blur, np.array([0.0, 1.0, 0.0, 1.0, 0.0]), 5)
    assert np.array_equal(out[::2], IMAGE[::2].astype(np.float32))
    assert not np.isclose(out[1], IMAGE[1], atol=0.05).all()


def test_only_reflection_keeps_the_edge_bright():
    white = np.ones((1, 9, 9, 1))
    kept, darkened = (
        ours(ops.blur, np.array([2.0]), 5, p, image=white) for p in ("reflect", "constant")
    )
    np.testing.assert_allclose(kept, 1.0, atol=1e-6)
    assert darkened[0, 0, 0, 0] < 0.6 and darkened[0, 4, 4, 0] > 0.999


@pytest.mark.parametrize("size", [4, 23])
def test_blur_that_does_not_fit(size):
    with pytest.raises(ValueError, match="does not fit an image of \\[14, 11\\]: use an odd size"):
        ours(ops.blur, FACTORS, size)


def test_bilinear_crop_is_pillows():
    """Antialiased where it shrinks, and no pixel beyond the box."""
    r = np.random.default_rng(1)
    image = r.uniform(0, 1, (4, 40, 33, 3)).astype(np.float32)
    boxes = np.array([[0, 0, 40, 33], [3, 5, 31, 20], [10, 1, 7, 6], [39, 32, 1, 1]], np.int32)
    out = np.asarray(
        jax.jit(ops.crop_resize, static_argnums=(2, 3))(image, boxes, 12, ops.triangle)
    )
    for x, (top, left, height, width), found in zip(image, boxes, out, strict=True):
        for c in range(3):
            part = PIL.Image.fromarray(
                np.ascontiguousarray(x[top : top + height, left : left + width, c])
            )
            expected = np.asarray(part.resize((12, 12), PIL.Image.Resampling.BILINEAR))
            np.testing.assert_allclose(found[..., c], expected, atol=2e-6)


def test_one_channel_is_gray_already():
    image, alone = IMAGE[..., :1], IMAGE[..., :1].astype(np.float32)
    for op in (ops.saturation, ops.hsv_saturation, ops.hue):
        assert np.array_equal(ours(op, FACTORS, image=image), alone)
    assert np.array_equal(ours(ops.grayscale, image=image), alone)
    for op in (ops.contrast, ops.channel_contrast):
        expected = blended(image, mean(image), FACTORS)
        np.testing.assert_allclose(ours(op, FACTORS, image=image), expected, atol=2e-6)


@pytest.mark.parametrize("op", [ops.contrast, ops.saturation, ops.hsv_saturation, ops.hue])
def test_two_channels_have_no_color(op):
    with pytest.raises(ValueError, match=r"one channel .* or three .* \[5, 14, 11, 2\]"):
        ours(op, FACTORS, image=IMAGE[..., :2])
