"""Optimizers as values: they print, compare and hash, and build optax transformations.

Which params decay is decided by path, never by rank: layers stacked for a scan have one axis more.
Schedules read the step, so an optimizer's state holds moments and no count of its own, but Adam's
number of updates, which corrects its bias.

Moments are float32, or with `moments=bfloat16` half as large (see `stored`).
"""

import abc
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from sslx.ops.bits import mixed, rounded
from sslx.ops.trees import matching, paths
from sslx.schedules import Constant
from sslx.types import Array, Params, Schedule, Tree

NORMS_AND_BIASES = r".*/(bias|scale)"


class Optimizer(abc.ABC):
    """An optax transformation that is a value."""

    learning_rate: float | Schedule
    moments: DTypeLike = jnp.float32  # what they are stored as
    patterns: ClassVar[tuple[str, ...]] = ("no_decay",)  # fields that name params by path

    def __post_init__(self):
        if isinstance(self.learning_rate, Real):
            object.__setattr__(self, "learning_rate", Constant(float(self.learning_rate)))
        if jnp.dtype(self.moments) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(
                f"moments={jnp.dtype(self.moments).name}: use float32 or bfloat16, whose range "
                f"holds the square of a small gradient."
            )

    @abc.abstractmethod
    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The transformation with its learning rate and sign: updates are added to params.

        Its `update` takes `step` and `layers` beside grads, state and params.
        """

    def check(self, params: Params, among: Params | None = None) -> None:
        """Raise ValueError for a pattern that matches no path: one that does nothing is a bug.

        `among` are all params of the run, where `params` are those of a group.
        """
        for name in self.patterns:
            pattern = getattr(self, name)
            if pattern and (name != "no_decay" or self.weight_decay):
                hint = f", or use {name}='' to match none"
                check_matches(params if among is None else among, pattern, name, hint)

    def init(self, params: Params) -> Tree:
        """The state of the optimizer; raises ValueError for what does not fit these params."""
        self.check(params)
        return self.transform().init(params)

    def update(
        self,
        grads: Tree,
        opt_state: Tree,
        params: Params,
        step: Array | int,
        layers: Tree | None = None,
    ) -> tuple[Tree, Tree]:
        """What is added to `params`, and the new state.

        layers  for each of the params, the axis on which the layers of a scan are stacked, -1 where
                none is; None where there is no scan. Where a norm of each array counts, a layer is
                an array of its own
        """
        layers = jax.tree.map(lambda _: -1, params) if layers is None else layers
        return self.transform().update(grads, opt_state, params, step=step, layers=layers)


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101): decay is scaled by the learning rate.

    Params whose path matches `no_decay` do not decay; `clip` bounds the gradient's global norm.
    """

    learning_rate: float | Schedule
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float | Schedule = 0.0
    no_decay: str = NORMS_AND_BIASES
    clip: float | None = None
    moments: DTypeLike = jnp.float32

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            clip_by_norm(self.clip),
            stored(optax.scale_by_adam(self.b1, self.b2, self.epsilon), self.moments),
            decay(self.weight_decay, self.no_decay),
            downhill(self.learning_rate),
        )


@dataclass(frozen=True)
class BERTAdam(Optimizer):
    """AdamW without the correction of its moments' bias (google-research/bert, `optimization.py`).

    Moments start at zero and are used as they are: a first step of (1 - b1) / sqrt(1 - b2), 3.2
    times AdamW's, and small ones where gradients are; the warm-up hides both.
    """

    learning_rate: float | Schedule
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float | Schedule = 0.01
    no_decay: str = NORMS_AND_BIASES
    clip: float | None = 1.0
    moments: DTypeLike = jnp.float32

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            clip_by_norm(self.clip),
            stored(uncorrected_adam(self.b1, self.b2, self.epsilon), self.moments),
            decay(self.weight_decay, self.no_decay),
            downhill(self.learning_rate),
        )


@dataclass(frozen=True)
class SGD(Optimizer):
    """Momentum as torch has it: decay is part of the gradient, the learning rate is outside."""

    learning_rate: float | Schedule
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float | Schedule = 0.0
    no_decay: str = NORMS_AND_BIASES
    moments: DTypeLike = jnp.float32

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            decay(self.weight_decay, self.no_decay),
            stored(optax.trace(self.momentum, self.nesterov), self.moments),
            downhill(self.learning_rate),
        )


@dataclass(frozen=True)
class LARS(Optimizer):
    """SGD with a rate for each array, the learning rate outside of the momentum.

    As in BYOL's, MAE's and MoCo v3's code, where a new learning rate acts on the whole velocity.
    An array's rate is trust * |param| / |gradient + decay|, or 1 where a norm is zero or its path
    matches `no_trust`.
    """

    learning_rate: float | Schedule
    momentum: float = 0.9
    trust: float = 1e-3
    weight_decay: float | Schedule = 0.0
    no_decay: str = NORMS_AND_BIASES
    no_trust: str = NORMS_AND_BIASES
    moments: DTypeLike = jnp.float32
    patterns = ("no_decay", "no_trust")

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            decay(self.weight_decay, self.no_decay),
            trusted(self.trust, self.no_trust),
            stored(optax.trace(self.momentum), self.moments),
            downhill(self.learning_rate),
        )


@dataclass(frozen=True)
class ClassicLARS(Optimizer):
    """LARS as its paper has it (arXiv:1708.03888, algorithm 1): the learning rate is inside.

    SimCLR's `classic_momentum` and optax.lars: each gradient enters the velocity with the learning
    rate of its own step. Equal to `LARS` only while the rate is constant.
    """

    learning_rate: float | Schedule
    momentum: float = 0.9
    trust: float = 1e-3
    weight_decay: float | Schedule = 0.0
    no_decay: str = NORMS_AND_BIASES
    no_trust: str = NORMS_AND_BIASES
    moments: DTypeLike = jnp.float32
    patterns = ("no_decay", "no_trust")

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            decay(self.weight_decay, self.no_decay),
            trusted(self.trust, self.no_trust),
            downhill(self.learning_rate),
            stored(optax.trace(self.momentum), self.moments),
        )


@dataclass(frozen=True)
class ClippedLARS(Optimizer):
    """solo-learn's LARS with `clip_lr`, of its CIFAR recipes: an array's rate times the learning
    rate is at most the learning rate, as in LARC.

    The rate is min(trust * |param| / (|gradient| + weight_decay * |param|) / learning rate, 1), on
    gradient + decay; arrays that match `plain` have neither decay nor a rate. The learning rate
    multiplies the velocity.
    """

    learning_rate: float | Schedule
    momentum: float = 0.9
    trust: float = 0.02
    weight_decay: float | Schedule = 0.0
    plain: str = NORMS_AND_BIASES
    moments: DTypeLike = jnp.float32
    patterns = ("plain",)

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            clipped(self.learning_rate, self.trust, self.weight_decay, self.plain),
            stored(optax.trace(self.momentum), self.moments),
            downhill(self.learning_rate),
        )


@dataclass(frozen=True)
class LAMB(Optimizer):
    """AdamW whose step for each array is as long as the array (arXiv:1904.00962, algorithm 2).

    Without bounds on the norms, with Adam's bias correction. Arrays that match `no_trust`, or with
    a norm of zero, take the step of AdamW.
    """

    learning_rate: float | Schedule
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float | Schedule = 0.0
    no_decay: str = NORMS_AND_BIASES
    no_trust: str = NORMS_AND_BIASES
    moments: DTypeLike = jnp.float32
    patterns = ("no_decay", "no_trust")

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            stored(optax.scale_by_adam(self.b1, self.b2, self.epsilon), self.moments),
            decay(self.weight_decay, self.no_decay),
            trusted(1.0, self.no_trust),
            downhill(self.learning_rate),
        )


# ---- transformations ----


def stateless(update: Callable[..., Tree]) -> optax.GradientTransformationExtraArgs:
    """A stateless transformation from a function (updates, params, step, layers) -> updates."""

    def transformed(updates, state, params=None, *, step, layers, **others):
        del others
        return update(updates, params, step, layers), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), transformed)


def value(of: float | Schedule, step: Array | int) -> Array | float:
    """The value of a number or of a schedule at this step."""
    return of(step) if callable(of) else of


def downhill(learning_rate: Schedule) -> optax.GradientTransformationExtraArgs:
    """Scale updates by minus the learning rate of the step."""

    def scaled(updates, params, step, layers):
        rate = -learning_rate(step)
        return jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, updates)

    return stateless(scaled)


def clip_by_norm(most: float | None) -> optax.GradientTransformation:
    """Bound the global norm of the gradient, unless `most` is None."""
    return optax.identity() if most is None else optax.clip_by_global_norm(most)


def decay(weight_decay: float | Schedule, no_decay: str) -> optax.GradientTransformation:
    """Add `weight_decay` times the param, where its path does not match `no_decay`."""
    if not weight_decay:
        return optax.identity()

    def decayed(updates, params, step, layers):
        rate, exempt = value(weight_decay, step), matching(params, no_decay)
        return jax.tree.map(lambda u, p, e: u if e else u + rate * p, updates, params, exempt)

    return stateless(decayed)


def stored(inner: optax.GradientTransformation, moments: DTypeLike) -> optax.GradientTransformation:
    """`inner` with moments stored as float32, or as bfloat16, which are half as large.

    They are computed and used in float32 and rounded at random where they are stored, by step,
    array and element, so that on average nothing is lost. Rounded to the nearest, a second moment
    with b2 = .999 could grow but never fall: it moves by a thousandth of itself, and a step of
    bfloat16 is 4 to 8. (DeepSeek-V3 stores both moments in bfloat16, with b2 = .95,
    arXiv:2412.19437; optax, big_vision and MaxText the first alone.)

    Rounding gives a second moment that stands still a deviation of 4 % at b2 = .999 and
    1 % at .95; one of independent gradients has 3 % and 23 % by itself. Measured: an MLP denoises
    digits, 3,000 steps, four seeds; loss in units of 1e-4, deviation over seeds 1 to 2:

             float32   at random   to the nearest
        .95   710.5      710.5         710.5
        .999  721.8      721.8         728.2
    """
    if jnp.dtype(moments) == jnp.float32:
        return inner

    def init(params: Params) -> Tree:
        narrow = lambda x: x.astype(moments) if x.dtype == jnp.float32 else x  # noqa: E731
        return jax.tree.map(narrow, inner.init(params))

    def update(grads, state, params=None, *, step, **others):
        del others
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == moments else x, state)
        updates, moved = inner.update(grads, wide, params)
        leaves, treedef = jax.tree.flatten(moved)
        seeds = mixed(jnp.uint32(step)) + jnp.arange(len(leaves), dtype=jnp.uint32)
        pairs = zip(leaves, seeds, strict=True)
        narrow = [rounded(x, seed) if x.dtype == jnp.float32 else x for x, seed in pairs]
        return updates, treedef.unflatten(narrow)

    return optax.GradientTransformationExtraArgs(init, update)


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


def trusted(trust: float, no_trust: str) -> optax.GradientTransformationExtraArgs:
    """Scale every update to `trust` times the norm of its param, but those matching `no_trust`."""
    scale = optax.scale_by_trust_ratio(trust_coefficient=trust)

    def ratio(update: Array, param: Array) -> Array:
        return scale.update(update, optax.EmptyState(), param)[0]

    def scaled(updates, params, step, layers):
        return each(ratio, matching(params, no_trust), layers, updates, params)

    return stateless(scaled)


def clipped(
    learning_rate: Schedule, trust: float, weight_decay: float | Schedule, plain: str
) -> optax.GradientTransformationExtraArgs:
    """The decayed gradient times its array's rate, see ClippedLARS."""

    def scaled(grads, params, step, layers):
        rate, decay = learning_rate(step), value(weight_decay, step)

        def one(grad: Array, param: Array) -> Array:
            size, slope = jnp.linalg.norm(param.ravel()), jnp.linalg.norm(grad.ravel())
            ratio = trust * size / (slope + decay * size + 1e-8) / rate  # their epsilon
            both = (size > 0) & (slope > 0)
            return jnp.where(both, jnp.minimum(ratio, 1) * (grad + decay * param), grad)

        return each(one, matching(params, plain), layers, grads, params)

    return stateless(scaled)


def each(
    function: Callable[..., Array], exempt: Tree, layers: Tree, updates: Tree, *others: Tree
) -> Tree:
    """`function` of each array that is not exempt; of stacked ones, of each layer."""

    def applied(exempt: bool, axis: int, *arrays: Array) -> Array:
        if exempt:
            return arrays[0]
        return function(*arrays) if axis < 0 else jax.vmap(function, axis, axis)(*arrays)

    return jax.tree.map(applied, exempt, layers, updates, *others)


# ---- which params ----


def check_matches(params: Params, pattern: str, field: str, hint: str = "") -> None:
    """Raise ValueError where no path matches `pattern`, an optimizer's `field`."""
    try:
        matches = matching(params, pattern)
    except re.error as error:
        raise ValueError(f"{field}={pattern!r} is no regular expression: {error}.") from error
    if not any(jax.tree.leaves(matches)):
        known = paths(params)
        example = next(iter(known), "none at all")
        raise ValueError(
            f"{field}={pattern!r} matches none of the {len(known)} params, such as {example}: "
            f"correct the pattern{hint}."
        )


# ---- scaling rules ----


def scaled(base: float, batch_size: int, per: int = 256) -> float:
    """The linear scaling rule (arXiv:1706.02677): `base` holds for a batch of `per`."""
    return base * batch_size / per
