"""Vision Transformer (arXiv:2010.11929) with fixed sin-cos positions, as MAE trains it."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from sslx.models.encoder import Floor, Signature
from sslx.models.layers import Dense
from sslx.models.transformer import Remat, Transformer
from sslx.ops.image import thumbnail
from sslx.ops.patches import grid, patchify
from sslx.ops.positions import sincos_2d
from sslx.sharding import constrain
from sslx.types import Array

# width, depth, heads: arXiv:2010.11929, table 1; Ti and S of arXiv:2012.12877; mu for tests.
VARIANTS = {
    "mu": (32, 2, 2),
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


class ViT(nn.Module):
    """Image [B, H, W, C] -> tokens [B, 1 + N, D]: the class token, then patches in raster order.

    With `keep` [B, K] only those patches are embedded and encoded, in the order given.
    """

    width: int
    depth: int
    heads: int
    patch: int
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    remat: Remat = "dots"

    @property
    def signature(self) -> Signature:
        """One class token in front of the patches; compared with raw pixels."""
        return Signature(("image",), prefix=1, floor=Floor("pixels", thumbnail))

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "B H W C"],
        train: bool = False,
        keep: Int[Array, "B K"] | None = None,
    ) -> Float[Array, "B N D"]:
        x = patchify(image, self.patch)  # [B, N, F]
        rows, columns, _ = grid(image, self.patch)
        position = jnp.asarray(sincos_2d(rows, columns, self.width))  # [N, D]
        if keep is not None:  # before the embedding: its cost falls with the masked share
            x = jnp.take_along_axis(x, keep[..., None], 1)  # [B, K, F]
            position = position[keep]  # [B, K, D]
        x = Dense(self.width, (None, "embed"), dtype=self.dtype, name="patch")(x)
        x = x + position.astype(self.dtype)
        first = self.param("class", nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
        first = jnp.broadcast_to(first.astype(self.dtype), (len(x), 1, self.width))
        x = constrain(jnp.concatenate([first, x], 1), "batch", None, None)  # [B, 1 + K, D]
        return Transformer(
            self.depth, self.heads, self.mlp_ratio, self.dtype, self.remat, name="transformer"
        )(x)


def vit(variant: str, patch: int, **fields) -> ViT:
    """The published size `variant` ("mu", "Ti", "S", "B", "L", "H") over patches of `patch` px."""
    if variant not in VARIANTS:
        raise ValueError(f"No ViT of variant {variant!r}: choose one of {', '.join(VARIANTS)}.")
    width, depth, heads = VARIANTS[variant]
    return ViT(width, depth, heads, patch, **fields)
