"""Pytrees by path."""

import re

import jax

from sslx.types import Tree


def path_of(keys) -> str:
    """A jax key path as `encoder/blocks/mlp/up/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def matching(tree: Tree, pattern: str) -> Tree:
    """True for every leaf whose whole path matches the regular expression `pattern`."""
    compiled = re.compile(pattern)
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: compiled.fullmatch(path_of(keys)) is not None, tree
    )


def norm(tree: Tree) -> jax.Array:
    """The global L2 norm of all leaves, in float32."""
    squares = [jax.numpy.sum(jax.numpy.square(x.astype("float32"))) for x in jax.tree.leaves(tree)]
    return jax.numpy.sqrt(sum(squares))
