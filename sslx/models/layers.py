"""Linen layers that name the logical axis of every dimension they create."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from sslx.sharding import constrain
from sslx.types import Array

Init = Callable[..., Array]
xavier = nn.initializers.xavier_uniform()

# Attention scores that a CPU has in its cache at a time: 2 MB of float32.
CACHED = 2**19


class Dense(nn.Module):
    """A linear map of the last `contract` axes onto `features`, initialized as one flat matrix.

    `axes` names every dimension of the kernel, those contracted first. FAIR's xavier sees qkv as
    one [D, 3D] matrix, so the fans are of the flat shape, whatever the kernel's own.
    """

    features: int | tuple[int, ...]
    axes: tuple[str | None, ...]
    contract: int = 1
    use_bias: bool = True
    kernel_init: Init = xavier
    bias_init: Init = nn.initializers.zeros
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        features = (self.features,) if isinstance(self.features, int) else self.features
        inputs = x.shape[-self.contract :]

        def flat(key: Array, shape: Sequence[int], dtype: DTypeLike) -> Array:
            matrix = (math.prod(inputs), math.prod(features))
            return self.kernel_init(key, matrix, dtype).reshape(shape)

        named = nn.with_logical_partitioning
        kernel = self.param("kernel", named(flat, self.axes), (*inputs, *features), jnp.float32)
        # Whole along fsdp before the product; XLA alone would send slices round a ring, each in a
        # product of its own: 1.3 times the cycles of ViT-L's step on v5e.
        whole = (None if name == "embed" else name for name in self.axes)
        kernel = constrain(jnp.asarray(kernel, self.dtype), *whole)
        y = jnp.tensordot(x.astype(self.dtype), kernel, axes=self.contract)
        if not self.use_bias:
            return y
        outputs = self.axes[self.contract :]
        bias = self.param("bias", named(self.bias_init, outputs), features, jnp.float32)
        return y + bias.astype(self.dtype)


class LayerNorm(nn.Module):
    """Normalize the last axis (arXiv:1607.06450), statistics in float32, two-pass variance."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale + bias).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762), softmax in float32."""

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"A width of {width} does not divide into {self.heads} heads.")
        shape = (3, self.heads, width // self.heads)
        qkv = Dense(shape, ("embed", None, "heads", None), dtype=self.dtype, name="qkv")(x)
        qkv = constrain(qkv, "batch", None, None, "heads", None)  # [B, N, 3, heads, D / heads]
        out = checkpoint_name(attention_for(qkv.dtype)(qkv), "attention")
        return Dense(width, ("heads", None, "embed"), contract=2, dtype=self.dtype, name="out")(out)


def attention_for(dtype: DTypeLike) -> Callable[[Array], Array]:
    """The softmax attention that is fastest where what is traced now will run."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    platform = device.platform if device else jax.default_backend()
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2:
        return flash
    return cached if platform == "cpu" and mesh.size <= 1 else fused


def flash(qkv: Float[Array, "B N 3 heads d"]) -> Float[Array, "B N heads d"]:
    """cuDNN's, which writes no scores to memory. It wants half precision and an even length."""
    tokens = qkv.shape[1]
    qkv = jnp.pad(qkv, ((0, 0), (0, tokens % 2), (0, 0), (0, 0), (0, 0)))
    q, k, v = (qkv[:, :, i] for i in range(3))
    n = jnp.full(len(qkv), tokens, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=n, key_value_seq_lengths=n, implementation="cudnn"
    )
    return out[:, :tokens]


def fused(qkv: Float[Array, "B N 3 heads d"]) -> Float[Array, "B N heads d"]:
    """Softmax attention, left to XLA and its libraries."""
    return jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)))


def cached(qkv: Float[Array, "B N 3 heads d"]) -> Float[Array, "B N heads d"]:
    """Softmax attention of a few examples at a time, recomputed in the backward pass.

    The scores of a whole batch go through memory many times, those of a few examples stay in the
    CPU's cache.
    """
    examples, tokens, _, heads, width = qkv.shape

    def attend(qkv):
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2)).reshape(3, -1, tokens, width)
        scores = jnp.einsum("hqd,hkd->hqk", q * width**-0.5, k)  # h: every head of every example
        share = jax.nn.softmax(scores.astype(jnp.float32)).astype(v.dtype)
        out = jnp.einsum("hqk,hkd->hqd", share, v)
        return out.reshape(-1, heads, tokens, width).swapaxes(1, 2)

    most = max(1, CACHED // (heads * tokens**2))
    few = max(n for n in range(1, most + 1) if examples % n == 0)
    parts = qkv.reshape(-1, few, *qkv.shape[1:])
    return jax.lax.map(jax.checkpoint(attend), parts).reshape(examples, tokens, heads, width)


class MLP(nn.Module):
    """Two linear maps around an erf GELU."""

    ratio: float = 4.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        hidden = round(width * self.ratio)
        x = Dense(hidden, ("embed", "mlp"), dtype=self.dtype, name="up")(x)
        x = jax.nn.gelu(constrain(x, "batch", None, "mlp"), approximate=False)
        return Dense(width, ("mlp", "embed"), dtype=self.dtype, name="down")(x)
