"""The device half of a data recipe: augmentation as values, run inside the jitted step.

A view is called with (key, batch) and returns the batch with its image changed. Randomness is
drawn for the global batch, so that it is the same on any mesh.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sslx.ops import image as ops
from sslx.sharding import constrain
from sslx.types import Array, Batch

View = Callable[[Array, Batch], Batch]
Op = Callable[[Array, Array], Array]  # image [B, H, W, C], amount [B] -> image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of the channels in [0, 1]
GRAY = ((0.3,), (0.37,))  # scikit-learn's digits
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class Chain:
    """Views in order, each with a key of its own; without links a batch stays as it is."""

    links: tuple[View, ...] = ()

    def __call__(self, key: Array, batch: Batch) -> Batch:
        for i, link in enumerate(self.links):
            batch = link(jax.random.fold_in(key, i), batch)
        return batch


@dataclass(frozen=True)
class Views:
    """The view that trains and the view that is evaluated; `Views()` changes nothing."""

    train: View = Chain()
    eval: View = Chain()


@dataclass(frozen=True)
class Stack:
    """One rendering of the same picture by each chain: image [B, V, H, W, C], other leaves kept.

    Each chain has its own random numbers, even where two are equal. Raises ValueError where they
    make images of two sizes.
    """

    chains: tuple[View, ...]

    def __call__(self, key: Array, batch: Batch) -> Batch:
        views = [chain(jax.random.fold_in(key, v), batch) for v, chain in enumerate(self.chains)]
        shapes = list(dict.fromkeys(view["image"].shape[1:] for view in views))
        if len(shapes) > 1:
            raise ValueError(
                f"The chains of one Stack make images of shapes {shapes}: give their crops one "
                f"size, or put the small ones into the `local` of a MultiCrop."
            )
        image = jnp.stack([view["image"] for view in views], 1)
        return {**views[0], "image": constrain(image, "batch", None, None, None, None)}


@dataclass(frozen=True)
class MultiCrop:
    """Views of two sizes: image [B, V, S, S, C] and local [B, L, s, s, C], other leaves kept."""

    whole: Stack
    part: Stack

    def __call__(self, key: Array, batch: Batch) -> Batch:
        local = self.part(jax.random.fold_in(key, 1), batch)["image"]
        return {**self.whole(jax.random.fold_in(key, 0), batch), "local": local}


# ---- where to look ----


@dataclass(frozen=True)
class RandomResizedCrop:
    """Image [B, H, W, C] -> float image [B, size, size, C]; uint8 pixels become numbers in [0, 1].

    `extent` [B, 2] is the height and width of each picture in its frame; without it they fill
    theirs. Raises ValueError where the image is smaller than the crop.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    kernel: ops.Kernel = ops.cubic  # or ops.triangle, bilinear: torchvision's default

    def __call__(self, key: Array, batch: Batch) -> Batch:
        boxes = ops.random_boxes(key, _extent(batch), self.scale, self.ratio)
        return _cropped(batch, boxes, self.size, self.kernel)


@dataclass(frozen=True)
class CenterCrop:
    """The centered square with `share` of the short side, at `size` x `size`."""

    size: int
    share: float = 1.0
    kernel: ops.Kernel = ops.cubic

    def __call__(self, key: Array, batch: Batch) -> Batch:
        boxes = ops.center_boxes(_extent(batch), self.share)
        return _cropped(batch, boxes, self.size, self.kernel)


def _extent(batch: Batch) -> Array:
    """Height and width of each picture [B, 2]."""
    whole = jnp.array(batch["image"].shape[1:3], jnp.int32)
    return batch.get("extent", jnp.broadcast_to(whole, (len(batch["image"]), 2)))


def _cropped(batch: Batch, boxes: Array, size: int, kernel: ops.Kernel) -> Batch:
    image = batch["image"]
    height, width = image.shape[1:3]
    if min(height, width) < size:
        raise ValueError(
            f"The image is smaller than the crop: {height} x {width} pixels would be blown up to "
            f"{size} x {size}. Decode the data larger, Image({size}), or use views of size "
            f"{min(height, width)}."
        )
    pixels = image.astype(jnp.float32) / (255 if image.dtype == jnp.uint8 else 1)
    image = ops.crop_resize(pixels, boxes, size, kernel)
    kept = {name: x for name, x in batch.items() if name not in ("image", "extent")}
    return {"image": constrain(image, "batch", None, None, None), **kept}


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with the given probability."""

    probability: float = 0.5

    def __call__(self, key: Array, batch: Batch) -> Batch:
        which = jax.random.bernoulli(key, self.probability, (len(batch["image"]),))
        return {**batch, "image": ops.flip(batch["image"], which)}


# ---- what it looks like ----


@dataclass(frozen=True)
class Factor:
    """`op` by a factor uniform in [1 - amount, 1 + amount], never below 0."""

    op: Op
    amount: float

    def draw(self, key: Array, examples: int) -> Array:
        low, high = max(0.0, 1 - self.amount), 1 + self.amount
        return jax.random.uniform(key, (examples,), minval=low, maxval=high)


@dataclass(frozen=True)
class Shift:
    """`op` by a number uniform in [-amount, amount]."""

    op: Op
    amount: float

    def draw(self, key: Array, examples: int) -> Array:
        return jax.random.uniform(key, (examples,), minval=-self.amount, maxval=self.amount)


@dataclass(frozen=True)
class ColorJitter:
    """All four changes of color, in an order of each example's own, with the given probability.

    Libraries mean different things by these words (`ops.contrast`, `ops.channel_contrast`): the
    recipe says which. Of one channel, saturation and hue change nothing.

    Only contrast reads more than a pixel: the mean of what came before it. So the other three are
    put in random order and the contrast in a random place among them, and two passes are enough
    over the image, one that ends in the mean and one that ends in the result. Within a pass every
    change is computed for every example; what it leaves out costs arithmetic, not memory.
    """

    brightness: Factor | Shift
    contrast: Factor
    saturation: Factor
    hue: Shift
    probability: float = 0.8

    def __call__(self, key: Array, batch: Batch) -> Batch:
        image, examples = batch["image"], len(batch["image"])
        applied, order, place, *keys = jax.random.split(key, 7)
        applied = jax.random.bernoulli(applied, self.probability, (examples,))
        order = jnp.argsort(jax.random.uniform(order, (examples, 3)), 1)
        early = jnp.arange(3) < jax.random.randint(place, (examples, 1), 0, 4)  # before contrast
        parts = (self.contrast, self.brightness, self.saturation, self.hue)
        contrast, *changes = (
            functools.partial(_changed, part.op, part.draw(k, examples))
            for part, k in zip(parts, keys, strict=True)
        )
        image = _in_order(changes, image, order, early & applied[:, None])
        image = contrast(image, applied)
        image = _in_order(changes, image, order, ~early & applied[:, None])
        return {**batch, "image": image}


def _in_order(changes, image: Array, order: Array, now: Array) -> Array:
    """Each example through the changes order[b, 0], order[b, 1], ... where now[b, i]."""
    for i in range(order.shape[1]):
        for which, change in enumerate(changes):
            image = change(image, now[:, i] & (order[:, i] == which))
    return image


def _changed(op: Op, amount: Array, image: Array, which: Array) -> Array:
    return jnp.where(which[:, None, None, None], op(image, amount), image)


@dataclass(frozen=True)
class Grayscale:
    """The gray image in every channel, with the given probability."""

    probability: float = 0.2

    def __call__(self, key: Array, batch: Batch) -> Batch:
        return _sometimes(ops.grayscale, self.probability, key, batch)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur by a kernel of `size` x `size` pixels, sigma uniform, with the probability.

    `padding` as in `ops.blur`: "constant" is SimCLR's and BYOL's, "reflect" torchvision's.
    """

    size: int
    probability: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    padding: ops.Padding = "constant"

    def __call__(self, key: Array, batch: Batch) -> Batch:
        keys, examples = jax.random.split(key), (len(batch["image"]),)
        applied = jax.random.bernoulli(keys[0], self.probability, examples)
        sigma = jax.random.uniform(keys[1], examples, minval=self.sigma[0], maxval=self.sigma[1])
        sigma = jnp.where(applied, sigma, 0.0)  # which leaves the image as it is
        return {**batch, "image": ops.blur(batch["image"], sigma, self.size, self.padding)}


@dataclass(frozen=True)
class Solarize:
    """Invert what is not below the threshold, with the given probability."""

    probability: float = 0.2
    threshold: float = 0.5

    def __call__(self, key: Array, batch: Batch) -> Batch:
        op = functools.partial(ops.solarize, threshold=self.threshold)
        return _sometimes(op, self.probability, key, batch)


def _sometimes(op, probability: float, key: Array, batch: Batch) -> Batch:
    image = batch["image"]
    which = jax.random.bernoulli(key, probability, (len(image), 1, 1, 1))
    return {**batch, "image": jnp.where(which, op(image), image)}


@dataclass(frozen=True)
class Normalize:
    """Subtract the channels' mean, divide by their std: both in [0, 1], one number per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, key: Array, batch: Batch) -> Batch:
        image = batch["image"]
        if not image.shape[-1] == len(self.mean) == len(self.std):
            raise ValueError(
                f"{self} is for {len(self.mean)} channels, but the image is {list(image.shape)}: "
                f"set Image(channels={len(self.mean)}), or give the recipe of views the "
                f"statistics of this data."
            )
        return {**batch, "image": (image - jnp.asarray(self.mean)) / jnp.asarray(self.std)}


# ---- views of published methods ----


def mae(
    size: int,
    scale: tuple[float, float] = (0.2, 1.0),
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET,
    flip: float = 0.5,
    share: float = 1.0,
) -> Views:
    """MAE's: random resized crop, flip, normalize, nothing else (`main_pretrain.py`).

    `share` of the short side is what the probes see: 224 / 256 on ImageNet.
    """
    train = Chain((RandomResizedCrop(size, scale), Flip(flip), Normalize(*statistics)))
    return Views(train, Chain((CenterCrop(size, share), Normalize(*statistics))))


def simclr(size: int, strength: float = 1.0, blur: float = 0.5, share: float = 1.0) -> Views:
    """SimCLR's (arXiv:2002.05709, appendix A): two views alike, pixels in [0, 1] not normalized.

    Of `tf2/data_util.py`: brightness a factor, contrast and saturation TensorFlow's, kernel of a
    tenth of the side. CIFAR-10 in the paper is `simclr(32, strength=0.5, blur=0.0)`.
    """
    jitter = ColorJitter(
        Factor(ops.brightness, 0.8 * strength),
        Factor(ops.channel_contrast, 0.8 * strength),
        Factor(ops.hsv_saturation, 0.8 * strength),
        Shift(ops.hue, 0.2 * strength),
    )
    links = (RandomResizedCrop(size), Flip(), jitter, Grayscale())
    if blur:
        links = (*links, Blur(_tenth(size), blur))
    return Views(Stack((Chain(links),) * 2), Chain((CenterCrop(size, share),)))


def byol(
    size: int,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET,
    share: float = 1.0,
) -> Views:
    """BYOL's two unlike views (arXiv:2006.07733, table 6), one always blurred, one solarized.

    Of DeepMind's `augmentations.py`: brightness is added, contrast and saturation TensorFlow's.
    """
    jitter = ColorJitter(
        Shift(ops.added_brightness, 0.4),
        Factor(ops.channel_contrast, 0.4),
        Factor(ops.hsv_saturation, 0.2),
        Shift(ops.hue, 0.1),
    )
    links = (RandomResizedCrop(size), Flip(), jitter, Grayscale())
    kernel, normalize = _tenth(size), Normalize(*statistics)
    one = Chain((*links, Blur(kernel, 1.0), normalize))
    other = Chain((*links, Blur(kernel, 0.1), Solarize(0.2), normalize))
    return Views(Stack((one, other)), Chain((CenterCrop(size, share), normalize)))


def cifar(
    strength: float = 1.0,
    size: int = 32,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = CIFAR10,
    kernel: ops.Kernel = ops.cubic,
) -> Views:
    """Two views alike for small pictures, no blur: solo-learn's `symmetric.yaml`.

    lightly's CIFAR-10 SimCLR is `cifar(0.5, statistics=IMAGENET, kernel=ops.triangle)`.
    """
    jitter = _torchvision(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    normalize = Normalize(*statistics)
    view = Chain((RandomResizedCrop(size, kernel=kernel), Flip(), jitter, Grayscale(), normalize))
    return Views(Stack((view, view)), Chain((CenterCrop(size), normalize)))


def cifar_asymmetric(
    size: int = 32,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = CIFAR10,
    kernel: ops.Kernel = ops.cubic,
) -> Views:
    """Two views for small pictures, the second solarized, no blur: solo-learn's `asymmetric.yaml`.

    lightly's CIFAR-10 BYOL is `cifar_asymmetric(statistics=IMAGENET, kernel=ops.triangle)`.
    """
    jitter, normalize = _torchvision(0.4, 0.4, 0.2, 0.1), Normalize(*statistics)
    links = (RandomResizedCrop(size, kernel=kernel), Flip(), jitter, Grayscale())
    one, other = Chain((*links, normalize)), Chain((*links, Solarize(0.2), normalize))
    return Views(Stack((one, other)), Chain((CenterCrop(size), normalize)))


def digits(
    size: int = 8,
    scale: tuple[float, float] = (0.5, 1.0),
    strength: float = 0.4,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = GRAY,
) -> Views:
    """Two views alike of small gray figures: crop, brightness, contrast; a mirrored 2 is no 2."""
    jitter, normalize = _torchvision(strength, strength, 0.0, 0.0), Normalize(*statistics)
    view = Chain((RandomResizedCrop(size, scale), jitter, normalize))
    return Views(Stack((view, view)), Chain((CenterCrop(size), normalize)))


def _torchvision(brightness: float, contrast: float, saturation: float, hue: float) -> ColorJitter:
    """torchvision's `ColorJitter`, applied with probability 0.8 as in every method."""
    return ColorJitter(
        Factor(ops.brightness, brightness),
        Factor(ops.contrast, contrast),
        Factor(ops.saturation, saturation),
        Shift(ops.hue, hue),
    )


def _tenth(size: int) -> int:
    """SimCLR's and BYOL's kernel, a tenth of the side, then made odd: 23 pixels at 224, 3 at 32."""
    return 2 * (size // 20) + 1
