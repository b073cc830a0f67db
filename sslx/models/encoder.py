"""Encoders: what is kept of a pretrained network, as a function from a batch to tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float

from sslx.types import Array, Batch, Tree

Pool = Literal["mean", "first"]


@dataclass(frozen=True)
class Floor:
    """Features of the raw input, which those of a trained encoder are compared with.

    features: a function of an encoder's leaves, `(*leaves) -> [B, F]`; `name` heads its column.
    """

    name: str
    features: Callable[..., Array]

    def __call__(self, variables: Tree, *leaves: Array) -> Float[Array, "B 1 F"]:
        """The features as the only token of an encoder without variables."""
        return self.features(*leaves)[:, None]


@dataclass(frozen=True)
class Signature:
    """What an encoder reads from a batch, and which of the tokens it returns are content.

    leaves  names of the leaves that it is called with, in this order
    prefix  number of tokens in front of the content (class token, registers)
    real    `(*leaves) -> bool [B, N]`, false where a token is padding; None where none is
    floor   the baseline that it is compared with, None where there is none
    """

    leaves: tuple[str, ...]
    prefix: int = 0
    real: Callable[..., Array] | None = None
    floor: Floor | None = None


@dataclass(frozen=True)
class Applied:
    """A Linen module in evaluation mode as a plain function of its variables and its inputs."""

    module: nn.Module

    def __call__(self, variables: Tree, *leaves: Array) -> Float[Array, "B N D"]:
        return self.module.apply(variables, *leaves, train=False)


@flax.struct.dataclass
class Encoder:
    """A network with its variables that turns a batch into tokens [B, N, D].

    Probes, k-NN, feature extraction and export read nothing else of a method. An encoder is a
    pytree whose leaves are its variables, so a jitted function takes it as an argument and compiles
    once for all checkpoints.

    network    `(variables, *leaves) -> tokens [B, N, D]`; hashable
    signature  the leaves it reads, and which of its tokens are content
    """

    variables: Tree
    network: Callable[..., Array] = flax.struct.field(pytree_node=False)
    signature: Signature = flax.struct.field(pytree_node=False)

    def __call__(self, batch: Batch) -> tuple[Float[Array, "B N D"], Bool[Array, "B N"]]:
        """Tokens, and which of them are real and no padding."""
        inputs = self.inputs(batch)
        tokens = self.network(self.variables, *inputs)
        if tokens.ndim != 3:
            raise ValueError(f"An encoder gives tokens [B, N, D] but this one gave {tokens.shape}.")
        real = self.signature.real
        return tokens, real(*inputs) if real else jnp.ones(tokens.shape[:2], bool)

    def pooled(self, batch: Batch, pool: Pool = "mean") -> Float[Array, "B D"]:
        """One float32 vector per example: see `pooled`."""
        tokens, real = self(batch)
        return pooled(tokens, self.signature.prefix, pool, real if self.signature.real else None)

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """The leaves that the network reads; raises ValueError where the batch lacks one."""
        if missing := [name for name in self.signature.leaves if name not in batch]:
            raise ValueError(
                f"The encoder reads {', '.join(missing)}, but the batch has only "
                f"{', '.join(batch)}: check the data's decoder and the recipe's views."
            )
        return tuple(batch[name] for name in self.signature.leaves)

    def __repr__(self) -> str:
        size = sum(x.size for x in jax.tree.leaves(self.variables))
        network = self.module or getattr(self.network, "__name__", self.network)
        return f"Encoder({network}, of {size:,} numbers, reads {', '.join(self.signature.leaves)})"

    @property
    def module(self) -> nn.Module | None:
        """The Linen module, None where the network is a plain function."""
        return self.network.module if isinstance(self.network, Applied) else None

    @property
    def floor(self) -> "Encoder | None":
        """The baseline as an encoder of the same leaves, None where there is none."""
        floor = self.signature.floor
        return floor and Encoder({}, floor, Signature(self.signature.leaves))


def encoder(module: nn.Module, variables: Tree) -> Encoder:
    """The Encoder of a Linen module such as ViT, ResNet or TextEncoder.

    The module is called with its leaves and `train=False`, and has a `signature`; a plain function
    becomes one by Encoder(variables, function, Signature(leaves)).
    """
    if not isinstance(getattr(module, "signature", None), Signature):
        raise ValueError(
            f"{type(module).__name__} does not say what it reads: give it a field or property "
            f"`signature`, such as Signature(('image',))."
        )
    return Encoder(variables, Applied(module), module.signature)


def chosen(encoders: Mapping[str, Encoder], name: str | None = None) -> Encoder:
    """The encoder of that name, by default the first; raises ValueError where there is none."""
    name = name or next(iter(encoders), "")
    if name not in encoders:
        raise ValueError(f"There is no encoder {name!r}: use one of {', '.join(encoders)}.")
    return encoders[name]


def pooled(tokens: Array, prefix: int, pool: Pool, real: Array | None = None) -> Array:
    """Tokens [B, N, D] -> float32 [B, D]: the mean of the content, or the first token.

    The mean leaves out the `prefix` tokens in front, and padding, where `real` [B, N] is false.
    """
    tokens = tokens.astype(jnp.float32)
    if pool == "first" and prefix == 0:
        raise ValueError("pool='first' needs a class token: use pool='mean'.")
    if pool == "first":
        return tokens[:, 0]
    if real is None:
        return tokens[:, prefix:].mean(1)
    weight = real[:, prefix:, None].astype(jnp.float32)  # [B, N, 1]
    return (tokens[:, prefix:] * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
