"""Position tables: fixed ones, computed once in float64, and rules that resize learned ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sslx.types import Array


def sincos_1d(position: Float[np.ndarray, " N"], width: int) -> Float[np.ndarray, "N D"]:
    """[sin(x w_i) ..., cos(x w_i) ...] with w_i = 10000^(-i / (D / 2)): blocks, not interleaved."""
    if width % 2:
        raise ValueError(f"A sin-cos table needs an even width, but got {width}.")
    rate = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angle = np.outer(position, rate)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_2d(rows: int, columns: int, width: int) -> Float[np.ndarray, "N D"]:
    """FAIR's table for MAE, float32: the first half of D encodes the column, the second the row.

    Positions are whole numbers at any grid size (`util/pos_embed.py`: "here w goes first").
    """
    if width % 4:
        raise ValueError(f"A 2-D sin-cos table needs a width divisible by 4, but got {width}.")
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    halves = [sincos_1d(x.ravel().astype(np.float64), width // 2) for x in (column, row)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def extended(table: Float[Array, "N *D"], fresh: Float[Array, "M *D"]) -> Float[Array, "M *D"]:
    """A learned table with `fresh`'s number of rows: its own as far as they go, then fresh ones.

    For text, whose positions count from the start of a window (BERT, from windows of 128 to 512),
    and for words that a tokenizer got more of.
    """
    return jnp.concatenate([table[: len(fresh)], fresh[len(table) :]])


def interpolated(table: Float[Array, "N D"], fresh: Float[Array, "M D"]) -> Float[Array, "M D"]:
    """A learned table of a square grid, resized to the square grid of `fresh`.

    Rows in front of the grid (a class token) are those that a square does not explain, and stay.
    Bicubic by size without antialiasing, as transformers resizes DINOv2's: torch's
    `interpolate(size=..., mode="bicubic")`.
    """
    return _of_grid(table, fresh, lambda n, m: _cubic(n, m, m / n))


def interpolated_by_scale(
    table: Float[Array, "N D"], fresh: Float[Array, "M D"]
) -> Float[Array, "M D"]:
    """The same by a scale of (new side + 0.1) / old side, as DINOv2's own code resizes its table.

    The grid is read a little off its center; a checkpoint trained so expects it.
    """
    return _of_grid(table, fresh, lambda n, m: _cubic(n, m, (m + 0.1) / n))


def antialiased(table: Float[Array, "N D"], fresh: Float[Array, "M D"]) -> Float[Array, "M D"]:
    """The same with antialiasing, as timm resizes tables, and DINOv2 those with registers."""
    return _of_grid(table, fresh, _smooth_cubic)


def _of_grid(table: Array, fresh: Array, weights: Callable[[int, int], np.ndarray]) -> Array:
    """`table` with its grid multiplied by weights(old side, new side) [M, N] along both axes."""
    before, after = (int(len(x) ** 0.5) for x in (table, fresh))
    prefix = len(table) - before**2
    if prefix != len(fresh) - after**2:
        raise ValueError(
            f"Position tables of {len(table)} and {len(fresh)} rows are not square grids behind as "
            f"many tokens: they cannot be interpolated."
        )
    weight = jnp.asarray(weights(before, after), table.dtype)
    grid = table[prefix:].reshape(before, before, -1)
    grid = jnp.einsum("ai,bj,ijd->abd", weight, weight, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table[:prefix], grid.reshape(after**2, -1)])


def _cubic(before: int, after: int, scale: float) -> Float[np.ndarray, "M N"]:
    """The four samples around each new one, by Keys' kernel with a = -3/4; edges repeated."""
    center = (np.arange(after) + 0.5) / scale - 0.5
    first = np.floor(center).astype(int)
    weight = np.zeros((after, before))
    for tap in range(-1, 3):
        column = np.clip(first + tap, 0, before - 1)
        np.add.at(weight, (np.arange(after), column), keys(center - (first + tap), -0.75))
    return weight


def _smooth_cubic(before: int, after: int) -> Float[np.ndarray, "M N"]:
    """Keys' kernel with a = -1/2, stretched where the grid shrinks; nothing outside counts."""
    stretch = max(1.0, before / after)
    center = (np.arange(after)[:, None] + 0.5) * before / after
    weight = keys((np.arange(before) + 0.5 - center) / stretch, -0.5)
    return weight / weight.sum(1, keepdims=True)


def keys(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981) at distances x."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
