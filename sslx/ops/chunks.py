"""A function of a batch computed in chunks, to hold one chunk's intermediates in memory."""

from collections.abc import Callable

import jax

from sslx.types import Tree


def in_chunks(f: Callable[[Tree], tuple[Tree, Tree]], batch: Tree, chunks: int):
    """`f(batch) = (y, rest)` from `chunks` parts of a batch, each computed again for its gradient.

    y, whose axis 0 is the example as in `batch`, is joined in the batch's order; `rest` is averaged
    over parts. Where f couples no examples, y and its gradient are those of f(batch). A part takes
    each chunks-th example, so that all devices share in it; one chunk is f(batch) itself.

    Raises ValueError when `chunks` does not divide the batch.
    """
    if chunks == 1:
        return f(batch)
    examples = len(jax.tree.leaves(batch)[0])
    if examples % chunks:
        raise ValueError(
            f"A batch of {examples} does not divide into chunks={chunks}: use a divisor of it."
        )
    parts = jax.tree.map(lambda x: x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1), batch)
    y, rest = jax.lax.map(jax.checkpoint(f, prevent_cse=False), parts)
    y = jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(-1, *y.shape[2:]), y)
    return y, jax.tree.map(lambda r: r.mean(0), rest)
