"""Masked autoencoding of pixels."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from sslx.models.encoder import Encoder, encoder
from sslx.models.layers import Dense
from sslx.models.transformer import Remat, Transformer
from sslx.models.vit import ViT
from sslx.objectives.base import Objective
from sslx.ops.masks import kept, shuffle
from sslx.ops.patches import grid, patchify, unpatchify
from sslx.ops.positions import sincos_2d
from sslx.sharding import constrain
from sslx.types import Array, Batch, Buffers, Metrics, Params


class Decoder(nn.Module):
    """Encoded visible tokens [B, 1 + K, D] -> pixels of every patch, in shuffled order.

    Attention knows no order but positions, so the tokens stay as they were shuffled and the
    hidden ones are the tail: where FAIR gathers to unshuffle, this adds shuffled positions.
    """

    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    remat: Remat = "dots"

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B K D"],
        order: Int[Array, "B N"],
        grid: tuple[int, int, int],
        skip: int = 0,
    ) -> Float[Array, "B M F"]:
        """`skip` leaves out the pixels of the first patches, the visible ones in training."""
        rows, columns, features = grid
        x = Dense(self.width, (None, "embed"), dtype=self.dtype, name="embed")(tokens)
        blank = self.param("mask", nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
        hidden = order.shape[1] + 1 - tokens.shape[1]
        blank = jnp.broadcast_to(blank.astype(self.dtype), (len(x), hidden, self.width))
        position = jnp.asarray(sincos_2d(rows, columns, self.width), self.dtype)[order]  # [B, N, D]
        x = jnp.concatenate([x, blank], 1)  # [B, 1 + N, D]
        x = x + jnp.pad(position, ((0, 0), (1, 0), (0, 0)))  # the class token has position zero
        x = Transformer(
            self.depth, self.heads, self.mlp_ratio, self.dtype, self.remat, name="transformer"
        )(constrain(x, "batch", None, None))
        x = x[:, 1 + skip :]
        return Dense(features, ("embed", None), dtype=self.dtype, name="pixels")(x)


@dataclass(frozen=True)
class MAE(Objective):
    """Reconstruct the masked patches of an image from the visible few (arXiv:2111.06377).

    batch    image [B, H, W, C]
    buffers  none
    """

    encoder: ViT
    decoder: Decoder
    ratio: float = 0.75
    normalize: bool = True  # targets by their patch's mean and variance: the paper's best, table 1d

    def init(self, key: Array, batch: Batch) -> tuple[Params, Buffers]:
        image = batch["image"]
        keys = jax.random.split(key, 3)
        order, keep = self.mask(keys[0], image)
        encoder = self.encoder.init(keys[1], image, keep=keep)["params"]
        tokens = self.encoder.apply({"params": encoder}, image, keep=keep)
        decoder = self.decoder.init(keys[2], tokens, order, self.grid(image))["params"]
        return {"encoder": encoder, "decoder": decoder}, {}

    def loss(
        self, params: Params, buffers: Buffers, batch: Batch, key: Array, step: Array
    ) -> tuple[Array, tuple[Buffers, Metrics]]:
        image = batch["image"]
        order, keep = self.mask(key, image)
        predicted = self.predict(params, image, order, keep, skip=keep.shape[1])  # [B, N - K, F]
        hidden = order[:, keep.shape[1] :, None]
        target = jnp.take_along_axis(self.target(image), hidden, 1)
        error = jnp.square(predicted.astype(jnp.float32) - target)
        return error.mean(), (buffers, {})  # every example hides as many: FAIR's masked mean

    def mask(self, key: Array, image: Float[Array, "B H W C"]):
        """A shuffled order of the patches [B, N], and its visible head [B, K]."""
        rows, columns, _ = self.grid(image)
        order = shuffle(key, len(image), rows * columns)
        return order, order[:, : kept(rows * columns, self.ratio)]

    def grid(self, image: Float[Array, "B H W C"]) -> tuple[int, int, int]:
        return grid(image, self.encoder.patch)

    def predict(self, params: Params, image, order, keep, skip: int = 0) -> Float[Array, "B M F"]:
        """Pixels of the patches `order[:, skip:]`, seen those in `keep`."""
        tokens = self.encoder.apply({"params": params["encoder"]}, image, train=True, keep=keep)
        variables = {"params": params["decoder"]}
        return self.decoder.apply(variables, tokens, order, self.grid(image), skip=skip)

    def target(self, image: Float[Array, "B H W C"]) -> Float[Array, "B N F"]:
        """Pixels of every patch; FAIR's variance is torch's, over F - 1."""
        target = patchify(image.astype(jnp.float32), self.encoder.patch)
        if not self.normalize:
            return target
        mean, var = target.mean(-1, keepdims=True), target.var(-1, keepdims=True, ddof=1)
        return (target - mean) * jax.lax.rsqrt(var + 1e-6)

    def reconstruct(self, params: Params, batch: Batch, key: Array) -> Float[Array, "B V H W C"]:
        """Each image three times: whole, masked (zero, the mean color), and with masked patches
        filled in by the decoder, brought back to the mean and variance of the patch they hide.
        """
        image = batch["image"]
        order, keep = self.mask(key, image)
        back = jnp.argsort(order, axis=1)[..., None]
        pixels = jnp.take_along_axis(self.predict(params, image, order, keep), back, 1)
        patches = patchify(image, self.encoder.patch)  # [B, N, F]
        if self.normalize:
            mean, std = patches.mean(-1, keepdims=True), patches.std(-1, keepdims=True, ddof=1)
            pixels = pixels * std + mean
        hidden = back >= keep.shape[1]  # [B, N, 1]
        panels = (patches, jnp.where(hidden, 0, patches), jnp.where(hidden, pixels, patches))
        shape = self.grid(image)[:2]
        return jnp.stack([unpatchify(x, self.encoder.patch, shape) for x in panels], 1)

    def encoders(self, params: Params, buffers: Buffers) -> dict[str, Encoder]:
        return {"encoder": encoder(self.encoder, {"params": params["encoder"]})}
