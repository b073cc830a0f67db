"""Linen layers that name the logical axis of every dimension they create."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from sslx.models.attention import attention
from sslx.sharding import constrain
from sslx.types import Array

Init = Callable[..., Array]
Gelu = Literal["erf", "tanh"]  # exact, or Google's approximation: they differ by up to 5e-4
xavier = nn.initializers.xavier_uniform()


@dataclass(frozen=True)
class Scaling:
    """An initializer that is a value: variance `scale` / fan, so that a config prints and compares.

    A kernel's axes are (..., inputs, outputs); those in front are the window, part of both fans.
    """

    scale: float
    mode: Literal["fan_in", "fan_out", "fan_avg"]
    distribution: Literal["normal", "truncated_normal", "uniform"]

    def __call__(self, key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        scaled = nn.initializers.variance_scaling(self.scale, self.mode, self.distribution)
        return scaled(key, shape, dtype)


@dataclass(frozen=True)
class Normal:
    """An initializer that is a value: normal with `std`, redrawn beyond `cut` of them if given.

    What is cut has a smaller deviation than `std`, 0.88 of it at 2: TensorFlow's and Google's.
    """

    std: float
    cut: float | None = None

    def __call__(self, key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        if self.cut is None:
            return self.std * jax.random.normal(key, shape, dtype)
        return self.std * jax.random.truncated_normal(key, -self.cut, self.cut, shape, dtype)


he = Scaling(2.0, "fan_out", "normal")  # arXiv:1502.01852; torchvision's and transformers' ResNet
torch_uniform = Scaling(1 / 3, "fan_in", "uniform")  # what torch's layers start with
lecun = Scaling(1.0, "fan_in", "truncated_normal")  # Keras's default, so SimCLR's ResNet


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
        shape, named = (*x.shape[-self.contract :], *features), nn.with_logical_partitioning
        init = functools.partial(flat, self.kernel_init, self.contract)
        kernel = self.param("kernel", named(init, self.axes), shape, jnp.float32)
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


def flat(init: Init, contract: int, key: Array, shape: Sequence[int], dtype: DTypeLike) -> Array:
    """A kernel that contracts its first axes, initialized as one matrix."""
    matrix = (math.prod(shape[:contract]), math.prod(shape[contract:]))
    return init(key, matrix, dtype).reshape(shape)


def padded(words: int) -> int:
    """The rows of a vocabulary's arrays: the next multiple of 128, which a tensor axis divides."""
    return -(-words // 128) * 128


class Table(nn.Module):
    """One vector for each of `rows` ids: looked up, or what a vector is compared with.

    Behind them stand `spare` rows of zeros that no id looks up. Their logits are -inf, so that
    their gradients are zero and they count for no norm.
    """

    rows: int
    features: int
    axes: tuple[str | None, str | None] = (None, "embed")
    spare: int = 0
    init: Init = Normal(0.02)
    dtype: DTypeLike = jnp.float32

    def setup(self):
        def init(key: Array, shape: Sequence[int], dtype: DTypeLike) -> Array:
            drawn = self.init(key, (self.rows, self.features), dtype)
            return jnp.pad(drawn, ((0, self.spare), (0, 0)))

        shape = (self.rows + self.spare, self.features)
        named = nn.with_logical_partitioning(init, self.axes)
        self.table = self.param("table", named, shape, jnp.float32)

    def whole(self, dtype: DTypeLike) -> Float[Array, "V D"]:
        """The table gathered along fsdp, as in Dense."""
        names = (None if name == "embed" else name for name in self.axes)
        return constrain(jnp.asarray(self.table, dtype), *names)

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        # Rounded after the lookup: a common word's gradients, thousands, are summed in float32.
        return self.whole(jnp.float32)[ids].astype(self.dtype)

    def compare(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Inner products with every row, in float32: logits, where weights are tied."""
        table = self.whole(self.dtype)
        y = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
        return jnp.where(jnp.arange(len(table)) < self.rows, y, -jnp.inf) if self.spare else y


class LayerNorm(nn.Module):
    """Normalize the last axis (arXiv:1607.06450), statistics in float32, two-pass variance."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        named = functools.partial(
            nn.with_logical_partitioning, names=(None,)
        )  # a scan adds its own
        scale = self.param("scale", named(nn.initializers.ones), x.shape[-1:], jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros), x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale + bias).astype(self.dtype)


class Conv(nn.Module):
    """A square convolution without bias, padded alike on all sides, as torch pads.

    TensorFlow's SAME pads an even image on one side when it strides: other outputs, same shape.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: int | None = None  # pixels on each side; kernel // 2 keeps the size at stride 1
    kernel_init: Init = he
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        init = nn.with_logical_partitioning(self.kernel_init, (None, None, None, "embed"))
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = jnp.asarray(self.param("kernel", init, shape, jnp.float32), self.dtype)
        pad = self.kernel // 2 if self.padding is None else self.padding
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            constrain(kernel, None, None, None, None),  # whole along fsdp, as in Dense
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BatchNorm(nn.Module):
    """Normalize every channel over the global batch and all positions (arXiv:1502.03167).

    In training by the batch's own mean and variance, of which `batch_stats` keeps moving averages;
    else by these. The kept variance is the biased one, over n, as in BYOL, SimCLR and Haiku; torch
    keeps the one over n - 1, and its `momentum` is one minus ours. All statistics are float32.
    """

    momentum: float = 0.9  # what stays of the average at each batch
    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    scale_init: Init = nn.initializers.ones
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], train: bool = False) -> Float[Array, "*B D"]:
        """Raises ValueError in training when a channel has a single value."""
        width = x.shape[-1:]
        kept_mean = self.variable("batch_stats", "mean", jnp.zeros, width, jnp.float32)
        kept_var = self.variable("batch_stats", "var", jnp.ones, width, jnp.float32)
        x = x.astype(jnp.float32)  # inside the fused loop: no copy of x is made
        mean, var = kept_mean.value, kept_var.value
        if train:
            if x.size == x.shape[-1]:
                raise ValueError(
                    f"BatchNorm trains on {list(x.shape)}, one value per channel, whose variance "
                    f"is zero, so that all outputs are equal: use a batch of two or more (in each "
                    f"micro-batch of `accumulate`), or train=False."
                )
            # Two readings of x. E[x^2] - E[x]^2 needs one, and has no digits left where the mean is
            # large beside the deviation, as in a fresh projector; nor is the kept mean near enough.
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            var = jnp.square(x - mean).mean(axes)
            if not self.is_initializing():
                for kept, new in ((kept_mean, mean), (kept_var, var)):
                    kept.value = self.momentum * kept.value + (1 - self.momentum) * new
        scale = jax.lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            scale = scale * self.param("scale", self.scale_init, width, jnp.float32)
        y = (x - mean) * scale
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, width, jnp.float32)
        return y.astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762), softmax in float32.

    With `segments` a token sees only those of its own segment.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    kernel_init: Init = xavier
    dropout: float = 0.0  # of attention's shares; it keeps all scores in memory

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], segments: Int[Array, "B N"] | None = None
    ) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"A width of {width} does not divide into {self.heads} heads.")
        shape = (3, self.heads, width // self.heads)
        kinds = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        qkv = Dense(shape, ("embed", None, "heads", None), **kinds, name="qkv")(x)
        qkv = constrain(qkv, "batch", None, None, "heads", None)  # [B, N, 3, heads, D / heads]
        drop = nn.Dropout(self.dropout, deterministic=False) if self.dropout else None
        out = checkpoint_name(attention(qkv, segments, drop), "attention")
        return Dense(width, ("heads", None, "embed"), contract=2, **kinds, name="out")(out)


class MLP(nn.Module):
    """Two linear maps around a GELU (arXiv:1606.08415), exact or its tanh form."""

    ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    kernel_init: Init = xavier
    gelu: Gelu = "erf"

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        hidden = round(width * self.ratio)
        kinds = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        x = Dense(hidden, ("embed", "mlp"), **kinds, name="up")(x)
        x = jax.nn.gelu(constrain(x, "batch", None, "mlp"), approximate=self.gelu == "tanh")
        return Dense(width, ("mlp", "embed"), **kinds, name="down")(x)
