"""Optimizers as values: they print, compare and hash, and build optax transformations.

Which params decay is decided by path, never by rank: layers stacked for a scan have one axis more.
"""

import abc
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sslx.ops.trees import matching, path_of
from sslx.types import Array, Params, Schedule, Tree

NORMS_AND_BIASES = r".*/(bias|scale)"
# Layers stacked for a scan, on axis 0: each has a trust ratio of its own.
STACKED = r"(.*/)?transformer/blocks/.*"


class Optimizer(abc.ABC):
    """An optax transformation that is a value."""

    learning_rate: Schedule

    @abc.abstractmethod
    def transform(self) -> optax.GradientTransformation:
        """The transformation with its learning rate and sign: updates are added to params."""

    def init(self, params: Params) -> Tree:
        return self.transform().init(params)

    def update(self, grads: Tree, opt_state: Tree, params: Params) -> tuple[Tree, Tree]:
        return self.transform().update(grads, opt_state, params)


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101): decay is scaled by the learning rate.

    Params whose path matches `no_decay` do not decay; `clip` bounds the gradient's global norm.
    """

    learning_rate: Schedule
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    no_decay: str = NORMS_AND_BIASES
    clip: float | None = None

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(self.b1, self.b2, self.epsilon),
            decay(self.weight_decay, self.no_decay),
            optax.scale_by_learning_rate(self.learning_rate),
        )


@dataclass(frozen=True)
class BERTAdam(Optimizer):
    """AdamW without the correction of its moments' bias (google-research/bert, `optimization.py`).

    Moments start at zero and are used as they are: a first step of (1 - b1) / sqrt(1 - b2), 3.2
    times AdamW's, and small ones where gradients are; the warm-up hides both.
    """

    learning_rate: Schedule
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    no_decay: str = NORMS_AND_BIASES
    clip: float | None = 1.0

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip),
            uncorrected_adam(self.b1, self.b2, self.epsilon),
            decay(self.weight_decay, self.no_decay),
            optax.scale_by_learning_rate(self.learning_rate),
        )


@dataclass(frozen=True)
class SGD(Optimizer):
    """Momentum as torch has it: decay is part of the gradient, the learning rate is outside."""

    learning_rate: Schedule
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    no_decay: str = NORMS_AND_BIASES

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            decay(self.weight_decay, self.no_decay),
            optax.trace(self.momentum, self.nesterov),
            optax.scale_by_learning_rate(self.learning_rate),
        )


@dataclass(frozen=True)
class LARS(Optimizer):
    """SGD with a rate for each array, the learning rate outside of the momentum.

    As in BYOL's, MAE's and MoCo v3's code, where a new learning rate acts on the whole velocity.
    An array's rate is trust * |param| / |gradient + decay|, or 1 where a norm is zero or its path
    matches `no_trust`.
    """

    learning_rate: Schedule
    momentum: float = 0.9
    trust: float = 1e-3
    weight_decay: float = 0.0
    no_decay: str = NORMS_AND_BIASES
    no_trust: str = NORMS_AND_BIASES

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            decay(self.weight_decay, self.no_decay),
            trusted(self.trust, self.no_trust),
            optax.trace(self.momentum),
            optax.scale_by_learning_rate(self.learning_rate),
        )


@dataclass(frozen=True)
class ClassicLARS(Optimizer):
    """LARS as its paper has it (arXiv:1708.03888, algorithm 1): the learning rate is inside.

    SimCLR's `classic_momentum` and optax.lars: each gradient enters the velocity with the learning
    rate of its own step. Equal to `LARS` only while the rate is constant.
    """

    learning_rate: Schedule
    momentum: float = 0.9
    trust: float = 1e-3
    weight_decay: float = 0.0
    no_decay: str = NORMS_AND_BIASES
    no_trust: str = NORMS_AND_BIASES

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            decay(self.weight_decay, self.no_decay),
            trusted(self.trust, self.no_trust),
            optax.scale_by_learning_rate(self.learning_rate),
            optax.trace(self.momentum),
        )


@dataclass(frozen=True)
class ClippedLARS(Optimizer):
    """solo-learn's LARS with `clip_lr`, of its CIFAR recipes: an array's rate times the learning
    rate is at most the learning rate, as in LARC.

    The rate is min(trust * |param| / (|gradient| + weight_decay * |param|) / learning rate, 1), on
    gradient + decay; arrays that match `plain` have neither decay nor a rate. The learning rate
    multiplies the velocity.
    """

    learning_rate: Schedule
    momentum: float = 0.9
    trust: float = 0.02
    weight_decay: float = 0.0
    plain: str = NORMS_AND_BIASES

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            clipped(self.learning_rate, self.trust, self.weight_decay, self.plain),
            optax.trace(self.momentum),
            optax.scale_by_learning_rate(self.learning_rate),
        )


@dataclass(frozen=True)
class LAMB(Optimizer):
    """AdamW whose step for each array is as long as the array (arXiv:1904.00962, algorithm 2).

    Without bounds on the norms, with Adam's bias correction. Arrays that match `no_trust`, or with
    a norm of zero, take the step of AdamW.
    """

    learning_rate: Schedule
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.0
    no_decay: str = NORMS_AND_BIASES
    no_trust: str = NORMS_AND_BIASES

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(self.b1, self.b2, self.epsilon),
            decay(self.weight_decay, self.no_decay),
            trusted(1.0, self.no_trust),
            optax.scale_by_learning_rate(self.learning_rate),
        )


# ---- parts ----


def decay(weight_decay: float, no_decay: str) -> optax.GradientTransformation:
    """Add `weight_decay` times the param, where its path does not match `no_decay`."""
    if not weight_decay:
        return optax.identity()  # nothing decays, so that no pattern has to match
    return optax.add_decayed_weights(weight_decay, lambda p: spared(p, no_decay, "no_decay"))


class Moments(NamedTuple):
    """Moving averages of the gradient and of its square."""

    mean: Tree
    square: Tree


def uncorrected_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    """mean / (sqrt(square) + epsilon), of moments that start at zero."""

    def init(params: Params) -> Moments:
        return Moments(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Tree, state: Moments, params: Params | None = None) -> tuple[Tree, Moments]:
        del params
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, grads)
        moved = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mean, square)
        return moved, Moments(mean, square)

    return optax.GradientTransformation(init, update)


def trusted(trust: float, no_trust: str) -> optax.GradientTransformation:
    """Scale every update to `trust` times the norm of its param, but those matching `no_trust`.

    Params stacked for a scan are scaled layer by layer, as if they were not stacked.
    """
    scale = optax.scale_by_trust_ratio(trust_coefficient=trust)

    def scaled(update: Array, param: Array) -> Array:
        return scale.update(update, optax.EmptyState(), param)[0]

    def leaf(update: Array, param: Array, on: bool, stacked: bool) -> Array:
        if not on:
            return update
        return (jax.vmap(scaled) if stacked else scaled)(update, param)

    def init(params: Params) -> Tree:
        spared(params, no_trust, "no_trust")  # a bad pattern fails here, before any step
        return optax.EmptyState()

    def update(updates: Tree, state: Tree, params: Params) -> tuple[Tree, Tree]:
        on, stacked = spared(params, no_trust, "no_trust"), matching(params, STACKED)
        return jax.tree.map(leaf, updates, params, on, stacked), state

    return optax.GradientTransformation(init, update)


class Count(NamedTuple):
    """Steps taken so far."""

    count: Array


def clipped(
    learning_rate: Schedule, trust: float, weight_decay: float, plain: str
) -> optax.GradientTransformation:
    """The decayed gradient times its array's rate, see ClippedLARS."""

    def scaled(grad: Array, param: Array, rate: Array) -> Array:
        size, slope = jnp.linalg.norm(param), jnp.linalg.norm(grad)
        ratio = trust * size / (slope + weight_decay * size + 1e-8) / rate  # their epsilon
        both = (size > 0) & (slope > 0)
        return jnp.where(both, jnp.minimum(ratio, 1) * (grad + weight_decay * param), grad)

    def leaf(grad: Array, param: Array, on: bool, stacked: bool, rate: Array) -> Array:
        if not on:
            return grad
        flat = (len(param), -1) if stacked else (1, -1)
        rows = (grad.reshape(flat), param.reshape(flat))
        return jax.vmap(lambda g, p: scaled(g, p, rate))(*rows).reshape(param.shape)

    def init(params: Params) -> Tree:
        spared(params, plain, "plain")
        return Count(jnp.int32(0))

    def update(updates: Tree, state: Count, params: Params) -> tuple[Tree, Tree]:
        on, stacked = spared(params, plain, "plain"), matching(params, STACKED)
        rate = learning_rate(state.count)
        moved = jax.tree.map(lambda *of: leaf(*of, rate), updates, params, on, stacked)
        return moved, Count(state.count + 1)

    return optax.GradientTransformation(init, update)


# ---- which params ----


def spared(params: Params, pattern: str, field: str) -> Tree:
    """False for every param whose path matches `pattern`, the optimizer's `field`.

    Raises ValueError when it matches no path at all: a mask that does nothing is a bug.
    """
    exempt = matching(params, pattern)
    if pattern and not any(jax.tree.leaves(exempt)):
        paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(
            f"{field}={pattern!r} matches none of the {len(paths)} params, such as {paths[0]}: "
            f"correct the pattern, or use {field}='' to exempt none."
        )
    return jax.tree.map(lambda e: not e, exempt)


# ---- scaling rules ----


def scaled(base: float, batch_size: int, per: int = 256) -> float:
    """The linear scaling rule (arXiv:1706.02677): `base` holds for a batch of `per`."""
    return base * batch_size / per


def root_scaled(base: float, batch_size: int, per: int = 256) -> float:
    """The square-root rule (arXiv:1404.5997): `base` holds for a batch of `per`.

    SimCLR's .075 sqrt(batch) (arXiv:2002.05709, B.1) has `per=1`.
    """
    return base * math.sqrt(batch_size / per)
