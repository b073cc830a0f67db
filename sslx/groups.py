"""Groups of params, each with an optimizer of its own, and optimizers made of others.

A group is no set of flags: it is whatever moves it, another optimizer value.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from sslx.ops.trees import matching, paths
from sslx.optim import Optimizer, check_matches, clip_by_norm, each, stateless
from sslx.types import Array, Params, Tree

EMBEDDINGS = r"encoder/(?!transformer/).*"  # of an encoder, all that is not in its transformer


@dataclass(frozen=True)
class Frozen(Optimizer):
    """Params that never move: no moments, no decay, whatever their gradient."""

    patterns = ()

    def transform(self) -> optax.GradientTransformationExtraArgs:
        return stateless(lambda updates, *_: jax.tree.map(jnp.zeros_like, updates))

    def learning_rate(self, step: Array | int) -> float:
        return 0.0


@dataclass(frozen=True)
class Wrapped(Optimizer):
    """An optimizer that changes what another one does."""

    optimizer: Optimizer

    def learning_rate(self, step: Array | int) -> Array | float:
        return self.optimizer.learning_rate(step)

    def check(self, params: Params, among: Params | None = None) -> None:
        self.optimizer.check(params, among)


@dataclass(frozen=True)
class Delayed(Wrapped):
    """Params that do not move for the first `steps` steps, and have no moments until then.

    Moments, decay and Adam's bias correction begin when they thaw, as where torch skips a param
    without a gradient: the last layer of DINO (arXiv:2104.14294) and the prototypes of SwAV. For a
    learning rate of zero over moments that run, as DINOv2's, use the schedule `After`.
    """

    steps: int

    def transform(self) -> optax.GradientTransformationExtraArgs:
        inner = self.optimizer.transform()

        def update(grads, state, params=None, *, step, layers):
            updates, moved = inner.update(grads, state, params, step=step, layers=layers)
            keep = lambda new, old: jnp.where(step >= self.steps, new, old)  # noqa: E731
            updates = jax.tree.map(lambda u: keep(u, jnp.zeros_like(u)), updates)
            return updates, jax.tree.map(keep, moved, state)

        return optax.GradientTransformationExtraArgs(inner.init, update)


@dataclass(frozen=True)
class ClippedEach(Wrapped):
    """Every array's gradient has a norm of at most `norm`, as in DINO (`utils.clip_gradients`)."""

    norm: float

    def transform(self) -> optax.GradientTransformationExtraArgs:
        def clip(grad: Array) -> Array:
            share = self.norm / (jnp.linalg.norm(grad.ravel()) + 1e-6)
            return grad * jnp.minimum(share, 1)

        def clipped(grads, params, step, layers):
            return each(clip, jax.tree.map(lambda _: False, grads), layers, grads)

        return optax.chain(stateless(clipped), self.optimizer.transform())


@dataclass(frozen=True)
class LayerWise(Wrapped):
    """Layer-wise decay of the learning rate (arXiv:2106.08254; MAE's `util/lr_decay.py`).

    Of n layers stacked for a scan, layer l from 0 learns at `decay ** (n - l)` of the learning
    rate, params that match `embeddings` at `decay ** (n + 1)`, and all others at the whole rate.
    """

    decay: float
    embeddings: str = EMBEDDINGS

    def check(self, params: Params, among: Params | None = None) -> None:
        check_matches(params, self.embeddings, "embeddings")
        self.optimizer.check(params, among)

    def transform(self) -> optax.GradientTransformationExtraArgs:
        def scaled(updates, params, step, layers):
            stacks = [
                x.shape[axis]
                for x, axis in zip(jax.tree.leaves(updates), jax.tree.leaves(layers), strict=True)
                if axis >= 0
            ]
            if not stacks:
                raise ValueError(
                    "LayerWise finds no layers: no param has an axis named `layers`, which nn.scan "
                    "gives with metadata_params={nn.PARTITION_NAME: 'layers'} to params that name "
                    "their axes."
                )

            def scale(update: Array, embedding: bool, axis: int) -> Array:
                if axis < 0:
                    return update * (self.decay ** (max(stacks) + 1) if embedding else 1)
                n = update.shape[axis]
                factors = self.decay ** (n - jnp.arange(n, dtype=jnp.float32))
                shape = [n if i == axis else 1 for i in range(update.ndim)]
                return update * factors.reshape(shape).astype(update.dtype)

            return jax.tree.map(scale, updates, matching(params, self.embeddings), layers)

        return optax.chain(self.optimizer.transform(), stateless(scaled))


@dataclass(frozen=True)
class Group:
    """Params whose whole path matches the regular expression `params`, and what moves them."""

    params: str
    optimizer: Optimizer


@dataclass(frozen=True)
class Grouped(Wrapped):
    """Every param is moved by the first group that it matches, the others by `optimizer`.

    `clip` bounds the norm of the gradient of all that is not frozen, before anything else; the
    `clip` of a group's optimizer bounds that of the group. Raises ValueError for a group in which
    no params are.
    """

    groups: tuple[Group, ...]
    clip: float | None = None

    def __post_init__(self):
        if not all(isinstance(group, Group) for group in self.groups):
            raise ValueError(f"groups={self.groups}: a tuple of Group(pattern, optimizer).")

    def check(self, params: Params, among: Params | None = None) -> None:
        among = params if among is None else among
        for i, group in enumerate(self.groups):
            check_matches(params, group.params, f"groups.{i}.params")
        of_groups = self.split(params, self.labels(params))
        for i, optimizer in self.optimizers.items():
            if i >= 0 and not of_groups[i]:
                raise ValueError(
                    f"groups.{i}.params={self.groups[i].params!r} matches only params of groups "
                    f"before it: put it first."
                )
            optimizer.check(of_groups[i], among)

    @property
    def optimizers(self) -> dict[int, Optimizer]:
        """The optimizer of each group by its number, and at -1 that of the others."""
        return {-1: self.optimizer} | {i: group.optimizer for i, group in enumerate(self.groups)}

    def split(self, tree: Tree, labels: dict[str, int]) -> dict[int, dict[str, Tree]]:
        """The leaves of each group by their paths."""
        named = paths(tree)
        return {i: {p: named[p] for p, at in labels.items() if at == i} for i in self.optimizers}

    def labels(self, params: Params) -> dict[str, int]:
        """The number of the group of each path, -1 for those of `optimizer`."""
        labels = dict.fromkeys(paths(params), -1)
        for i, group in reversed(list(enumerate(self.groups))):
            hits = jax.tree.leaves(matching(params, group.params))
            labels |= {path: i for path, hit in zip(labels, hits, strict=True) if hit}
        return labels

    def transform(self) -> optax.GradientTransformationExtraArgs:
        inner = {i: optimizer.transform() for i, optimizer in self.optimizers.items()}
        moving = [i for i, o in self.optimizers.items() if not isinstance(o, Frozen)]
        clip = clip_by_norm(self.clip)

        def init(params: Params) -> dict[str, Tree]:
            of_groups = self.split(params, self.labels(params))
            return {str(i): inner[i].init(of_groups[i]) for i in inner}

        def update(grads, state, params=None, *, step, layers):
            labels = self.labels(params)
            trees = [self.split(tree, labels) for tree in (grads, params, layers)]
            grads_of, params_of, layers_of = trees
            free, _ = clip.update({i: grads_of[i] for i in moving}, optax.EmptyState())
            updates, moved = {}, {}
            for i in inner:
                given = (free.get(i, grads_of[i]), state[str(i)], params_of[i])
                of_group, moved[str(i)] = inner[i].update(*given, step=step, layers=layers_of[i])
                updates |= of_group
            treedef = jax.tree.structure(grads)
            return treedef.unflatten(updates[path] for path in labels), moved

        return optax.GradientTransformationExtraArgs(init, update)
