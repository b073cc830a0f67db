"""A stack of transformer blocks, scanned over depth and rematerialized by a named policy."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from sslx.models.layers import MLP, Attention, Gelu, Init, LayerNorm, xavier
from sslx.sharding import constrain
from sslx.types import Array

Remat = Literal["none", "dots", "full"]


def flashed(primitive, *_, **__) -> bool:
    """A remat policy that saves the outputs of cuDNN's attention."""
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


@dataclass(frozen=True)
class Form:
    """The form of a transformer of a given size; the default is ViT's.

    norm     before attention and MLP, with one more at the end of the stack, or after each is added
    dropout  of what attention and MLP add; `attention_dropout` of attention's shares
    """

    norm: Literal["pre", "post"] = "pre"
    epsilon: float = LayerNorm.epsilon
    gelu: Gelu = "erf"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init: Init = xavier  # of every kernel

    def __post_init__(self):
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm={self.norm!r}: use 'pre' or 'post'.")
        if self.gelu not in ("erf", "tanh"):
            raise ValueError(f"gelu={self.gelu!r}: use 'erf' or 'tanh'.")


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    heads: int
    mlp_ratio: float
    dtype: DTypeLike
    form: Form = Form()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], segments: Int[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N D"], None]:
        form, pre = self.form, self.form.norm == "pre"
        norm1, norm2 = (LayerNorm(form.epsilon, self.dtype, name=f"norm{i}") for i in (1, 2))
        attention = Attention(
            self.heads, self.dtype, form.init, form.attention_dropout, name="attention"
        )
        mlp = MLP(self.mlp_ratio, self.dtype, form.init, form.gelu, name="mlp")
        drop = nn.Dropout(form.dropout, deterministic=False)  # at 0 it draws nothing
        x = constrain(x, "batch", None, None)
        if pre:
            x = x + drop(attention(norm1(x), segments))
            x = x + drop(mlp(norm2(x)))
        else:
            x = norm1(x + drop(attention(x, segments)))
            x = norm2(x + drop(mlp(x)))
        return constrain(x, "batch", None, None), None


class Transformer(nn.Module):
    """`depth` blocks and, of pre-norm ones, a final norm; their params are stacked on axis 0.

    With `segments` a token sees only those of its own segment. Nothing is dropped but in training.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    remat: Remat = "dots"
    form: Form = Form()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        segments: Int[Array, "B N"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B N D"]:
        form = self.form if train else replace(self.form, dropout=0.0, attention_dropout=0.0)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=POLICIES[self.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(self.heads, self.mlp_ratio, self.dtype, form, name="blocks")(x, segments)
        if form.norm == "post":
            return x
        return LayerNorm(form.epsilon, self.dtype, name="norm")(x)
