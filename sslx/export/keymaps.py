"""Our params and the names other libraries give them: a table per architecture, read both ways.

A row holds our path, their name and the einops pattern from our array to theirs; backwards, the
pattern is read from the right. An axis in braces in the name is spread over names: `{l}` counts
the layers, which we stack for the scan, `{t}` is query, key, value. The letters of sizes:

l layers   d width   h heads   e width of a head   t query, key, value   m hidden width of the MLP
k width of the encoder that a decoder reads   p q rows, columns of a patch   c channels
v words, behind which our arrays have rows to spare   s positions   z types of tokens
x y of a single token: 1
"""

import itertools
import re
from collections.abc import Iterator, Mapping

import einops
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sslx.models.layers import padded
from sslx.types import Tree

Table = tuple[tuple[str, str, str], ...]
Arrays = Mapping[str, np.ndarray]

WORDS = {"t": ("query", "key", "value")}

# Rows that the layers of several architectures share.
NORM = (("scale", "weight", "d -> d"), ("bias", "bias", "d -> d"))
NORMS = (("scale", "weight", "l d -> l d"), ("bias", "bias", "l d -> l d"))  # of all layers
UP = (("kernel", "weight", "l d m -> l m d"), ("bias", "bias", "l m -> l m"))
DOWN = (("kernel", "weight", "l m d -> l d m"), ("bias", "bias", "l d -> l d"))
OUT = (("kernel", "weight", "l h e d -> l d (h e)"), ("bias", "bias", "l d -> l d"))


def under(ours: str, theirs: str, table: Table) -> Table:
    """The same rows, inside a branch of our tree and behind a prefix of their names."""
    return tuple((ours + path, theirs + name, how) for path, name, how in table)


def named_arrays(table: Table, params: Tree, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Our params as their arrays by name, float32.

    Raises ValueError when params and table do not hold the same paths.
    """
    flat, paths = flatten_dict(params, sep="/"), [path for path, _, _ in table]
    if odd := sorted(set(flat) ^ set(paths)):
        raise ValueError(
            f"This model cannot be written in the other library's names: {listed(odd)} stand in "
            f"its params or in the table of sslx/export/architectures, but not in both."
        )
    arrays = {}
    for path, name, how in table:
        array = np.asarray(flat[path], np.float32)
        if how[0] == "v":
            array = array[: sizes["v"]]
        array = _rearrange(array, how, sizes, path)
        array = array.reshape(-1, *array.shape[name.count("{") :])
        arrays |= dict(zip(names(name, sizes), array, strict=True))
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def params_of(table: Table, arrays: Mapping, sizes: Mapping[str, int]) -> Tree:
    """Their arrays by name as our params, float32; each is read when its turn comes.

    Raises ValueError where an array's shape is not what `sizes` say.
    """
    flat = {}
    for path, name, how in table:
        ours, theirs = how.split(" -> ")
        stack = [np.asarray(arrays[n], np.float32) for n in names(name, sizes)]
        if len(shapes := {x.shape for x in stack}) > 1:
            raise ValueError(
                f"{name} has the shapes {' and '.join(str(list(s)) for s in sorted(shapes))}: the "
                f"layers of a model are of one shape."
            )
        array = np.stack(stack)
        spread = [len(WORDS.get(axis, ())) or sizes[axis] for axis in axes(name)]
        array = array.reshape((*spread, *array.shape[1:]))
        array = _rearrange(array, f"{theirs} -> {ours}", sizes, name)
        if how[0] == "v":
            array = np.pad(array, [(0, padded(len(array)) - len(array)), (0, 0)][: array.ndim])
        flat[path] = array
    return unflatten_dict(flat, sep="/")


def names(name: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """Their names of the arrays that we stack into one, in the order of the stack."""
    values = [WORDS.get(axis) or range(sizes[axis]) for axis in axes(name)]
    for chosen in itertools.product(*values):
        yield name.format(**dict(zip(axes(name), chosen, strict=True)))


def axes(name: str) -> list[str]:
    return re.findall(r"{(\w)}", name)


def sizes_of(stack) -> dict[str, int]:
    """The letters of a stack of transformer blocks: a ViT, an MAE decoder, a TextEncoder."""
    hidden, head = round(stack.width * stack.mlp_ratio), stack.width // stack.heads
    return {"l": stack.depth, "d": stack.width, "h": stack.heads, "e": head, "m": hidden, "t": 3}


def listed(items: list[str], most: int = 4) -> str:
    """The first few of a long list of names, and how many there are.

    Names that others chose stay on one line: no newline, no sequence that a terminal obeys.
    """
    shown = ", ".join(x[:200] if x.isprintable() else repr(x)[:200] for x in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def _rearrange(array: np.ndarray, how: str, sizes: Mapping[str, int], what: str) -> np.ndarray:
    named = {axis: sizes[axis] for axis in re.findall(r"\w", how.split("->")[0]) if axis in sizes}
    try:
        return einops.rearrange(array, how, **named)
    except einops.EinopsError as error:
        expected = ", ".join(f"{axis}={size}" for axis, size in named.items())
        raise ValueError(
            f"{what} has shape {list(array.shape)}, which is not {how.split(' ->')[0]!r} with "
            f"{expected}: the weights are those of another model than the one described."
        ) from error
