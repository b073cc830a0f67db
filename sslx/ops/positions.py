"""Fixed position tables, computed once in float64."""

import numpy as np
from jaxtyping import Float


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
