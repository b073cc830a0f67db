"""The device half of a data recipe: augmentation as values, run inside the jitted step.

A view is called with (key, batch) and returns the batch with its image changed. Randomness is
drawn for the global batch, so that it is the same on any mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sslx.ops import image as ops
from sslx.sharding import constrain
from sslx.types import Array, Batch

View = Callable[[Array, Batch], Batch]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of the channels in [0, 1]
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class Views:
    """What the objective sees in training, and what the probes see."""

    train: View
    eval: View


@dataclass(frozen=True)
class Chain:
    """Views in order, each with a key of its own."""

    links: tuple[View, ...]

    def __call__(self, key: Array, batch: Batch) -> Batch:
        for i, link in enumerate(self.links):
            batch = link(jax.random.fold_in(key, i), batch)
        return batch


@dataclass(frozen=True)
class RandomResizedCrop:
    """uint8 image [B, H, W, C], extent [B, 2] -> float image [B, size, size, C] in [0, 1]."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, key: Array, batch: Batch) -> Batch:
        boxes = ops.random_boxes(key, batch["extent"], self.scale, self.ratio)
        return _cropped(batch, boxes, self.size)


@dataclass(frozen=True)
class CenterCrop:
    """The centered square with `share` of the short side, at `size` x `size`, in [0, 1]."""

    size: int
    share: float = 1.0

    def __call__(self, key: Array, batch: Batch) -> Batch:
        return _cropped(batch, ops.center_boxes(batch["extent"], self.share), self.size)


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with the given probability."""

    probability: float = 0.5

    def __call__(self, key: Array, batch: Batch) -> Batch:
        which = jax.random.bernoulli(key, self.probability, (len(batch["image"]),))
        return {**batch, "image": ops.flip(batch["image"], which)}


@dataclass(frozen=True)
class Normalize:
    """Subtract the channels' mean, divide by their std: both in [0, 1], one number per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, key: Array, batch: Batch) -> Batch:
        image = (batch["image"] - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        return {**batch, "image": image}


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


def _cropped(batch: Batch, boxes: Array, size: int) -> Batch:
    image = batch["image"].astype(jnp.float32) / 255
    image = constrain(ops.crop_resize(image, boxes, size), "batch", None, None, None)
    return {"image": image, **{k: v for k, v in batch.items() if k not in ("image", "extent")}}
