"""Projection and prediction heads, which train beside an encoder and are dropped afterwards."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float

from sslx.models.encoder import Pool, pooled
from sslx.models.layers import BatchNorm, Dense
from sslx.sharding import constrain
from sslx.types import Array

Where = Literal["none", "hidden", "all"]  # in no layer, in all but the last, in every one


class Head(nn.Module):
    """Features [B, D] -> [B, widths[-1]]: linear maps with BatchNorm where `norm` says, and ReLU
    after all but the last.

    A BatchNorm behind the last map has no bias, as in SimCLR. Kernels are normal with `std`; with
    none, normal with std 1 / sqrt(inputs) and cut at two of them, Haiku's default.
    """

    widths: tuple[int, ...]
    norm: Where = "hidden"
    bias: Where = "hidden"  # of the linear maps
    std: float | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], train: bool = False) -> Float[Array, "B P"]:
        for i, width in enumerate(self.widths):
            last = i + 1 == len(self.widths)
            axes = ("mlp", "embed") if i % 2 else ("embed", "mlp")
            here = {"none": False, "hidden": not last, "all": True}
            x = Dense(
                width,
                axes,
                use_bias=here[self.bias],
                kernel_init=functools.partial(normal, std=self.std),
                dtype=self.dtype,
                name=f"linear{i}",
            )(x)
            x = constrain(x, "batch", None if i % 2 or last else "mlp")
            if here[self.norm]:
                x = BatchNorm(use_bias=not last, dtype=self.dtype, name=f"norm{i}")(x, train)
            x = x if last else nn.relu(x)
        return x


def normal(key: Array, shape: tuple[int, int], dtype: DTypeLike, std: float | None) -> Array:
    if std is not None:
        return std * jax.random.normal(key, shape, dtype)
    return jax.random.truncated_normal(key, -2, 2, shape, dtype) / shape[0] ** 0.5


def simclr(layers: int = 3, hidden: int = 2048, out: int = 128, **fields) -> Head:
    """SimCLR's projector: BatchNorm behind every map, no other biases (google-research/simclr,
    `tf2/model.py`; arXiv:2002.05709 itself has 2 layers).

    solo-learn's and lightly's without BatchNorm: simclr(2, norm="none", bias="all", std=None).
    """
    fields = {"norm": "all", "bias": "none", "std": 0.01} | fields
    return Head((*(hidden,) * (layers - 1), out), **fields)


def byol(hidden: int = 4096, out: int = 256, **fields) -> Head:
    """BYOL's projector, and its predictor (deepmind-research, `byol/utils/networks.py`)."""
    return Head((hidden, out), **fields)


class Siamese(nn.Module):
    """Image [B, H, W, C] -> (prediction [B, P], embedding [B, P], features [B, D]).

    Without a predictor the prediction is the embedding. The encoder gives tokens [B, N, D]; `pool`
    says what of them is embedded, and that of Probes, apart, what is probed.
    """

    encoder: nn.Module
    projector: nn.Module
    predictor: nn.Module | None = None
    pool: Pool = "mean"

    def __call__(self, image: Float[Array, "B H W C"], train: bool = False):
        z, h = self.embed(image, train)
        return (z if self.predictor is None else self.predictor(z, train)), z, h

    def embed(self, image: Float[Array, "B H W C"], train: bool = False):
        """(embedding [B, P], features [B, D]): all but the predictor."""
        h = self.encode(image, train)
        return self.project(h, train), h

    def encode(self, image: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B D"]:
        """The mean of the patch tokens, or the first token, in float32."""
        return pooled(self.encoder(image, train), self.encoder.signature.prefix, self.pool)

    def project(self, h: Float[Array, "B D"], train: bool = False) -> Float[Array, "B P"]:
        return self.projector(h, train)
