"""A stack of transformer blocks, scanned over depth and rematerialized by a named policy."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float

from sslx.models.layers import MLP, Attention, LayerNorm
from sslx.sharding import constrain
from sslx.types import Array

Remat = Literal["none", "dots", "full"]


def flashed(primitive, *_, **__) -> bool:
    """Saveable is what cuDNN's attention gives: its output and the sums of its softmax."""
    return primitive.name.startswith("dot_product_attention_fwd")


# What the backward pass finds stored: all that it asks for; what matrix products gave, so that only
# element-wise work and attention's scores are done again; the input of each block.
POLICIES: dict[str, Callable[..., bool]] = {
    "dots": functools.reduce(
        jax.checkpoint_policies.save_from_both_policies,
        (
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names("attention"),
            flashed,
        ),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    heads: int
    mlp_ratio: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> tuple[Float[Array, "B N D"], None]:
        x = constrain(x, "batch", None, None)
        h = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = x + Attention(self.heads, self.dtype, name="attention")(h)
        h = LayerNorm(dtype=self.dtype, name="norm2")(x)
        x = x + MLP(self.mlp_ratio, self.dtype, name="mlp")(h)
        return constrain(x, "batch", None, None), None


class Transformer(nn.Module):
    """`depth` pre-norm blocks and a final norm; params of all blocks are stacked on axis 0."""

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    remat: Remat = "dots"

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=POLICIES[self.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(self.heads, self.mlp_ratio, self.dtype, name="blocks")(x)
        return LayerNorm(dtype=self.dtype, name="norm")(x)
