"""Optimizers as values: they print, compare and hash, and build optax transformations.

Which params decay is decided by path, never by rank: layers stacked for a scan have one axis more.
"""

import abc
from dataclasses import dataclass

import jax
import optax

from sslx.ops.trees import matching, path_of
from sslx.types import Params, Schedule, Tree

NORMS_AND_BIASES = r".*/(bias|scale)"


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
            optax.add_decayed_weights(self.weight_decay, mask=lambda p: decayed(p, self.no_decay)),
            optax.scale_by_learning_rate(self.learning_rate),
        )


def decayed(params: Params, no_decay: str) -> Tree:
    """True where weight decay applies.

    Raises ValueError when `no_decay` matches no path at all: a mask that does nothing is a bug.
    """
    exempt = matching(params, no_decay)
    if no_decay and not any(jax.tree.leaves(exempt)):
        paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(
            f"no_decay={no_decay!r} matches none of the {len(paths)} params, such as {paths[0]}: "
            f"correct the pattern, or use no_decay='' to decay them all."
        )
    return jax.tree.map(lambda e: not e, exempt)


def scaled(base: float, batch_size: int, per: int = 256) -> float:
    """The linear scaling rule (arXiv:1706.02677): `base` holds for a batch of `per`."""
    return base * batch_size / per
