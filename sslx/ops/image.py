"""Image operations for the accelerator: whole batches, static shapes, no gathers.

Images are in [0, 1] and stay there. A parameter is one number per example; nothing is random. Each
operation of color and sharpness is pixelwise or a sum of shifted images, so that XLA fuses it with
its neighbors; contrast alone reads the image twice. An image of one channel is gray already:
`saturation`, `hue` and `grayscale` return it as it is.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from sslx.types import Array

Kernel = Callable[[Array], Array]  # distance in pixels -> weight; zero from distance 2 on
Padding = Literal["constant", "reflect"]
LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue: torchvision's, TensorFlow's, DeepMind's


# ---- cropping ----


def cubic(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Keys' bicubic kernel with a = -1/2: Pillow's, and torch's where it antialiases."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def triangle(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The bilinear kernel."""
    return jnp.maximum(1.0 - jnp.abs(x), 0.0)


def resample(
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    size: int,
    out: int,
    kernel: Kernel = cubic,
) -> Float[Array, "B out size"]:
    """Matrices that crop `length` of `size` pixels from `start` on and resize them to `out`.

    Crop first, then resize, as torchvision does: no tap reads beyond the crop's edge. Antialiased:
    when shrinking, the kernel widens by the scale.
    """
    start, length = (x.astype(jnp.float32)[:, None, None] for x in (start, length))
    scale = length / out  # [B, 1, 1]
    center = (jnp.arange(out)[None, :, None] + 0.5) * scale  # [B, out, 1], within the crop
    pixel = jnp.arange(size)[None, None, :] - start  # [B, 1, size]
    weight = kernel((pixel + 0.5 - center) / jnp.maximum(scale, 1.0))
    weight = jnp.where((pixel >= 0) & (pixel < length), weight, 0.0)
    return weight / weight.sum(-1, keepdims=True)


def crop_resize(
    image: Float[Array, "B H W C"], box: Int[Array, "B 4"], out: int, kernel: Kernel = cubic
) -> Float[Array, "B out out C"]:
    """Boxes (top, left, height, width) of images in [0, 1], resized to `out` x `out`.

    `kernel` is `cubic` or `triangle`, antialiased. Two small matrix products for an image; the
    cubic's overshoot is clipped as Pillow clips it. They are exact float32, which costs: 165 MFLOP
    for a picture of 256 pixels at 224, in six passes of bfloat16 on a TPU, without tensor cores on
    a GPU. One pass would leave errors of 2^-9, half a step of the 8 bits that the picture had.
    """
    top, left, height, width = box.T
    rows = resample(top, height, image.shape[1], out, kernel)
    columns = resample(left, width, image.shape[2], out, kernel)
    exact = jax.lax.Precision.HIGHEST
    image = jnp.einsum("boh,bhwc->bowc", rows, image, precision=exact)
    image = jnp.einsum("bow,bhwc->bhoc", columns, image, precision=exact)
    return jnp.clip(image, 0.0, 1.0)


def random_boxes(
    key: Array,
    extent: Int[Array, "B 2"],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    tries: int = 10,
) -> Int[Array, "B 4"]:
    """torchvision's RandomResizedCrop: area uniform in `scale`, aspect log-uniform in `ratio`.

    Of `tries` draws the first that fits into (height, width) = `extent` counts; if none does,
    the largest centered box within `ratio`.
    """
    keys = jax.random.split(key, 4)
    examples = len(extent)
    height, width = extent[:, :1], extent[:, 1:]  # [B, 1]
    share = jax.random.uniform(keys[0], (examples, tries), minval=scale[0], maxval=scale[1])
    low, high = jnp.log(jnp.asarray(ratio))
    aspect = jnp.exp(jax.random.uniform(keys[1], (examples, tries), minval=low, maxval=high))
    area = share * height * width
    w = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)  # [B, tries]
    h = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits, axis=1)[:, None]
    w, h = (jnp.take_along_axis(x, first, 1) for x in (w, h))  # [B, 1]
    top = jnp.floor(jax.random.uniform(keys[2], (examples, 1)) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(keys[3], (examples, 1)) * (width - w + 1))
    drawn = jnp.concatenate([top.astype(jnp.int32), left.astype(jnp.int32), h, w], 1)
    return jnp.where(fits.any(1)[:, None], drawn, _centered_within(extent, ratio))


def _centered_within(extent: Int[Array, "B 2"], ratio: tuple[float, float]) -> Int[Array, "B 4"]:
    height, width = extent[:, 0], extent[:, 1]
    w = jnp.minimum(width, jnp.round(height * ratio[1]).astype(jnp.int32))
    h = jnp.minimum(height, jnp.round(width / ratio[0]).astype(jnp.int32))
    return jnp.stack([(height - h) // 2, (width - w) // 2, h, w], 1)


def center_boxes(extent: Int[Array, "B 2"], share: float) -> Int[Array, "B 4"]:
    """Centered squares with `share` of the short side: 224 / 256 is "resize to 256, crop 224"."""
    side = jnp.round(extent.min(1) * share).astype(jnp.int32)
    return jnp.stack([(extent[:, 0] - side) // 2, (extent[:, 1] - side) // 2, side, side], 1)


def flip(image: Float[Array, "B H W C"], which: Array) -> Float[Array, "B H W C"]:
    """Mirror left and right the examples in `which`, bool [B]."""
    return jnp.where(which[:, None, None, None], image[:, :, ::-1], image)


# ---- color ----


def brightness(image: Float[Array, "B H W C"], factor: Float[Array, " B"]) -> Array:
    """Times `factor`: torchvision's, and SimCLR's second version."""
    return jnp.clip(_each(factor) * image, 0.0, 1.0)


def added_brightness(image: Float[Array, "B H W C"], delta: Float[Array, " B"]) -> Array:
    """Plus `delta`: TensorFlow's, and so DeepMind's."""
    return jnp.clip(image + _each(delta), 0.0, 1.0)


def contrast(image: Float[Array, "B H W C"], factor: Float[Array, " B"]) -> Array:
    """Distances from the mean of the gray image times `factor`: torchvision's."""
    return _blend(luma(image).mean((1, 2), keepdims=True), image, factor)


def channel_contrast(image: Float[Array, "B H W C"], factor: Float[Array, " B"]) -> Array:
    """Distances from each channel's own mean times `factor`: TensorFlow's, DeepMind's."""
    return _blend(image.mean((1, 2), keepdims=True), image, factor)


def saturation(image: Float[Array, "B H W C"], factor: Float[Array, " B"]) -> Array:
    """Distances from the gray image times `factor`: torchvision's."""
    return image if image.shape[-1] == 1 else _blend(luma(image), image, factor)


def hsv_saturation(image: Float[Array, "B H W C"], factor: Float[Array, " B"]) -> Array:
    """S of HSV times `factor`, at most 1, hue and value kept: TensorFlow's, DeepMind's.

    Every channel is v (1 - s w) with w of the hue alone, so their distances from v scale with s.
    """
    if image.shape[-1] == 1:
        return image
    low, high = _extremes(image)
    full = high / jnp.maximum(high - low, 1e-12)  # the factor that makes s = 1
    return jnp.clip(high - (high - image) * jnp.minimum(_each(factor), full), 0.0, 1.0)


def hue(image: Float[Array, "B H W C"], turn: Float[Array, " B"]) -> Array:
    """H of HSV plus `turn`, a share of the full circle: torchvision's, TensorFlow's, DeepMind's."""
    if image.shape[-1] == 1:
        return image
    low, high = _extremes(image)
    red, green, blue = _planes(image)
    span = high - low
    scale = 1.0 / jnp.where(span > 0, span, 1.0)  # a gray pixel has hue 0, and span 0 hides it
    sixth = jnp.where(
        high == red,
        (green - blue) * scale,
        jnp.where(high == green, 2.0 + (blue - red) * scale, 4.0 + (red - green) * scale),
    )
    sixth = (sixth + 6.0 * _each(turn)) % 6.0  # [B, H, W, 1], in sixths of the circle
    # How far each channel is from `low` to `high`: a trapezoid around its own color.
    away = [jnp.abs(sixth - 3.0) - 1.0, 2.0 - jnp.abs(sixth - 2.0), 2.0 - jnp.abs(sixth - 4.0)]
    return low + span * jnp.clip(jnp.concatenate(away, -1), 0.0, 1.0)


def grayscale(image: Float[Array, "B H W C"]) -> Array:
    """The gray image in every channel."""
    return jnp.broadcast_to(luma(image), image.shape)


def solarize(image: Float[Array, "B H W C"], threshold: float = 0.5) -> Array:
    """Invert what is not below `threshold`: torchvision's, DeepMind's."""
    return jnp.where(image < threshold, image, 1.0 - image)


def luma(image: Float[Array, "B H W C"]) -> Float[Array, "B H W 1"]:
    """The gray image."""
    if image.shape[-1] == 1:
        return image
    # a sum, not a product with LUMA: that would be rounded to bfloat16 on a TPU
    return sum(weight * plane for weight, plane in zip(LUMA, _planes(image), strict=True))


def _planes(image: Float[Array, "B H W C"]) -> list[Float[Array, "B H W 1"]]:
    """Red, green and blue; raises ValueError where these are not the channels."""
    if image.shape[-1] != 3:
        raise ValueError(
            f"Color operations read one channel (gray) or three (red, green, blue), but the image "
            f"is {list(image.shape)}: leave them out of the views, or set Image(channels=3)."
        )
    return [image[..., i : i + 1] for i in range(3)]


def _each(x: Float[Array, " B"]) -> Float[Array, "B 1 1 1"]:
    return x[:, None, None, None]


def _blend(one: Array, other: Array, share: Float[Array, " B"]) -> Array:
    """`share` of `other`, and the rest of `one`."""
    share = _each(share)
    return jnp.clip(share * other + (1.0 - share) * one, 0.0, 1.0)


def _extremes(image: Float[Array, "B H W C"]) -> tuple[Array, Array]:
    """The least and the largest of red, green and blue, each [B, H, W, 1]."""
    red, green, blue = _planes(image)
    low = jnp.minimum(jnp.minimum(red, green), blue)
    return low, jnp.maximum(jnp.maximum(red, green), blue)


def thumbnail(image: Float[Array, "B H W C"], side: int = 16) -> Float[Array, "B F"]:
    """Every image as a flat vector of its pixels, first downsized to at most `side` x `side`."""
    examples, height, width, channels = image.shape
    shape = (examples, min(height, side), min(width, side), channels)
    if shape != image.shape:
        image = jax.image.resize(image, shape, "linear")  # antialiased
    return image.reshape(examples, -1)


# ---- sharpness ----


def blur(
    image: Float[Array, "B H W C"],
    sigma: Float[Array, " B"],
    size: int,
    padding: Padding = "constant",
) -> Float[Array, "B H W C"]:
    """Gaussian blur of `sigma` pixels, cut to `size` x `size` (odd) and scaled to sum 1.

    Beyond the edge are zeros ("constant": SimCLR's and DeepMind's, whose edges darken) or the
    mirrored image ("reflect": torchvision's). With sigma 0 an example stays exactly as it is.

    Shifted images are summed along one axis, then the other: a tenth of the arithmetic of banded
    matrices at 224 pixels, and on two CPU cores 1.8 to 3.6 times as fast.
    Raises ValueError where `size` is even or does not fit into the image.
    """
    radius = size // 2
    if size % 2 == 0 or radius >= min(image.shape[1:3]):
        raise ValueError(
            f"A blur of {size} x {size} pixels does not fit an image of {list(image.shape[1:3])}: "
            f"use an odd size, about a tenth of the image's side."
        )
    distance = jnp.arange(-radius, radius + 1)
    weight = jnp.exp(-0.5 * jnp.square(distance / jnp.maximum(sigma, 1e-3)[:, None]))
    weight = weight / weight.sum(1, keepdims=True)  # [B, size]
    for axis in (1, 2):
        margin = [(radius, radius) if i == axis else (0, 0) for i in range(4)]
        padded, length = jnp.pad(image, margin, padding), image.shape[axis]
        image = sum(
            _each(weight[:, i]) * jax.lax.slice_in_dim(padded, i, i + length, axis=axis)
            for i in range(size)
        )
    return image
