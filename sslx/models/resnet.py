"""Residual networks (arXiv:1512.03385), as torchvision, transformers and timm compute them."""

import functools
from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float

from sslx.models.encoder import Floor, Signature
from sslx.models.layers import BatchNorm, Conv, Init, he
from sslx.ops.image import thumbnail
from sslx.sharding import constrain
from sslx.types import Array

# The convolutions of a block by their window; after three there are four times the channels.
BASIC, BOTTLENECK = (3, 3), (1, 3, 1)

# kernels, blocks of each stage: arXiv:1512.03385, table 1; mu for tests.
VARIANTS = {
    "mu": (BASIC, (1, 1)),
    "18": (BASIC, (2, 2, 2, 2)),
    "34": (BASIC, (3, 4, 6, 3)),
    "50": (BOTTLENECK, (3, 4, 6, 3)),
    "101": (BOTTLENECK, (3, 4, 23, 3)),
    "152": (BOTTLENECK, (3, 8, 36, 3)),
}


@dataclass(frozen=True)
class Stem:
    """The first layers of a ResNet: one convolution, and maybe a max-pool 3x3 of stride 2."""

    kernel: int
    stride: int
    padding: int
    pool: bool


IMAGENET_STEM = Stem(7, 2, 3, pool=True)
CIFAR_STEM = Stem(3, 1, 1, pool=False)  # arXiv:2002.05709, B.9; solo-learn's pads by 2


class Block(nn.Module):
    """Convolutions of `kernels`, each normalized, added to the identity.

    The first 3x3 has the stride, as in torchvision ("v1.5"; the paper's bottleneck has it in the
    1x1). Where the shape changes, a 1x1 of the same stride stands for the identity.
    """

    kernels: tuple[int, ...]
    channels: int
    stride: int
    last_gamma: float
    kernel_init: Init
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        conv = functools.partial(Conv, kernel_init=self.kernel_init, dtype=self.dtype)
        norm = functools.partial(BatchNorm, dtype=self.dtype)
        width, last = self.channels * expansion(self.kernels), len(self.kernels)
        y = x
        for i, kernel in enumerate(self.kernels, 1):
            stride = self.stride if i == 1 + self.kernels.index(3) else 1
            y = conv(width if i == last else self.channels, kernel, stride, name=f"conv{i}")(y)
            if i < last:
                y = nn.relu(norm(name=f"norm{i}")(y, train))
        gamma = nn.initializers.constant(self.last_gamma)
        y = norm(scale_init=gamma, name=f"norm{last}")(y, train)
        if self.stride > 1 or x.shape[-1] != width:
            x = conv(width, 1, self.stride, name="conv0")(x)
            x = norm(name="norm0")(x, train)
        return constrain(nn.relu(x + y), "batch", None, None, None)


class ResNet(nn.Module):
    """Image [B, H, W, C] -> tokens [B, N, D]: the positions of the last feature map, row by row.

    Every stage after the first halves the sides, rounding up, and doubles the channels. Batch
    statistics are in the collection `batch_stats`; under jit they are those of the global batch.
    """

    kernels: tuple[int, ...]
    blocks: tuple[int, ...]  # in each stage
    channels: int = 64  # of the stem, and inside the blocks of the first stage
    stem: Stem = IMAGENET_STEM
    last_gamma: float = 0.0  # of each block's last norm: 0 starts at the identity (1706.02677)
    kernel_init: Init = he
    dtype: DTypeLike = jnp.float32

    @property
    def signature(self) -> Signature:
        """Every token is a position of the feature map; compared with raw pixels."""
        return Signature(("image",), floor=Floor("pixels", thumbnail))

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W C"], train: bool = False
    ) -> Float[Array, "B N D"]:
        stem, init = self.stem, {"kernel_init": self.kernel_init, "dtype": self.dtype}
        x = Conv(self.channels, stem.kernel, stem.stride, stem.padding, **init, name="conv")(image)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, train))
        if stem.pool:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = constrain(x, "batch", None, None, None)
        for stage, blocks in enumerate(self.blocks):
            for i in range(blocks):
                x = Block(
                    self.kernels,
                    self.channels * 2**stage,
                    stride=2 if stage and not i else 1,
                    last_gamma=self.last_gamma,
                    **init,
                    name=block_name(stage, i),
                )(x, train)
        return x.reshape(len(x), -1, x.shape[-1])

    @property
    def width(self) -> int:
        """D."""
        return self.channels * 2 ** (len(self.blocks) - 1) * expansion(self.kernels)


def resnet(depth: int | str, width: int = 1, **fields) -> ResNet:
    """The published depth 18, 34, 50, 101 or 152, or "mu", all channels `width` times as many.

    Blocks are not stacked for a scan, as transformers' are: they differ in shape, and LARS has one
    trust ratio for each array.
    """
    if str(depth) not in VARIANTS:
        raise ValueError(f"No ResNet of depth {depth!r}: choose one of {', '.join(VARIANTS)}.")
    kernels, blocks = VARIANTS[str(depth)]
    channels = 8 if depth == "mu" else 64
    return ResNet(kernels, blocks, channels * width, **fields)


def expansion(kernels: tuple[int, ...]) -> int:
    """The ratio of a block's output channels to its inner ones."""
    return 4 if kernels == BOTTLENECK else 1


def block_name(stage: int, block: int) -> str:
    """The branch of params of a block; both count from 0 here and from 1 in the name."""
    return f"stage{stage + 1}_block{block + 1}"
