"""Images as sequences of flat patches."""

import einops
from jaxtyping import Float

from sslx.types import Array


def patchify(image: Float[Array, "B H W C"], patch: int) -> Float[Array, "B N F"]:
    """Cut into patches in raster order, each flattened in the order (row, column, channel).

    Raises ValueError when the image does not divide into patches.
    """
    height, width = image.shape[1:3]
    if height % patch or width % patch:
        raise ValueError(
            f"An image of {height}x{width} does not divide into patches of {patch}: choose an "
            f"image size that is a multiple of {patch}, or another patch size."
        )
    return einops.rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def grid(image: Float[Array, "B H W C"], patch: int) -> tuple[int, int, int]:
    """(rows, columns, values of one patch): what `patchify` makes of an image."""
    height, width, channels = image.shape[1:]
    return height // patch, width // patch, patch**2 * channels


def unpatchify(
    patches: Float[Array, "B N F"], patch: int, grid: tuple[int, int]
) -> Float[Array, "B H W C"]:
    """The inverse of `patchify` for a grid of (rows, columns) patches."""
    sizes = {"h": grid[0], "w": grid[1], "p": patch, "q": patch}
    return einops.rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", **sizes)
