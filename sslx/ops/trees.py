"""Pytrees by path."""

import re

import jax
import jax.numpy as jnp
from flax.core.meta import AxisMetadata

from sslx.types import Array, Tree


def path_of(keys) -> str:
    """A jax key path as `encoder/blocks/mlp/up/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def paths(tree: Tree) -> dict[str, Tree]:
    """Every leaf by its path; boxed ones in their boxes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=boxed)
    return {path_of(keys): leaf for keys, leaf in leaves}


def boxed(leaf) -> bool:
    """Whether a leaf still carries the names of its axes."""
    return isinstance(leaf, AxisMetadata)


def matching(tree: Tree, pattern: str) -> Tree:
    """True for every leaf whose whole path matches the regular expression `pattern`."""
    compiled = re.compile(pattern)

    def match(keys, leaf):
        hit = compiled.fullmatch(path_of(keys)) is not None
        return jax.tree.map(lambda _: hit, leaf)  # a boxed leaf keeps its box

    return jax.tree_util.tree_map_with_path(match, tree, is_leaf=boxed)


def axis_named(tree: Tree, name: str) -> Tree:
    """For every leaf, boxed or not, the axis of that name; -1 where it has none."""

    def axis(leaf) -> int:
        names = getattr(leaf, "names", ()) if boxed(leaf) else ()
        return names.index(name) if name in names else -1

    return jax.tree.map(axis, tree, is_leaf=boxed)


def norm(tree: Tree) -> Array:
    """The global L2 norm of all leaves, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
