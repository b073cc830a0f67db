"""Image operations for the accelerator: whole batches, static shapes, no gathers."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from sslx.types import Array


def cubic(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Keys' bicubic kernel with a = -1/2: Pillow's, and torch's where it antialiases."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def resample(
    start: Int[Array, " B"], length: Int[Array, " B"], size: int, out: int
) -> Float[Array, "B out size"]:
    """Matrices that crop `length` of `size` pixels from `start` on and resize them to `out`.

    Crop first, then resize, as torchvision does: no tap reads beyond the crop's edge. Antialiased:
    when shrinking, the kernel widens by the scale.
    """
    start, length = (x.astype(jnp.float32)[:, None, None] for x in (start, length))
    scale = length / out  # [B, 1, 1]
    center = (jnp.arange(out)[None, :, None] + 0.5) * scale  # [B, out, 1], within the crop
    pixel = jnp.arange(size)[None, None, :] - start  # [B, 1, size]
    weight = cubic((pixel + 0.5 - center) / jnp.maximum(scale, 1.0))
    weight = jnp.where((pixel >= 0) & (pixel < length), weight, 0.0)
    return weight / weight.sum(-1, keepdims=True)


def crop_resize(
    image: Float[Array, "B H W C"], box: Int[Array, "B 4"], out: int
) -> Float[Array, "B out out C"]:
    """Boxes (top, left, height, width) of images in [0, 1], resized to `out` x `out`, bicubic.

    Two small matrix products for an image; overshoot is clipped as Pillow clips it.
    """
    top, left, height, width = box.T
    rows = resample(top, height, image.shape[1], out)
    columns = resample(left, width, image.shape[2], out)
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
