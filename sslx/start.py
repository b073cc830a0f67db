"""Params of step 0 from another run or checkpoint."""

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from sslx import checkpoint
from sslx.export import hf
from sslx.models.layers import padded
from sslx.ops.positions import extended
from sslx.ops.trees import path_of
from sslx.paths import Remote, place
from sslx.types import Array, Buffers, Params

log = logging.getLogger("sslx")

WORDS = ("word/table", "head/bias")  # arrays with a row for each word, padded
ALL = (("params", "params"), ("buffers", "buffers"))

Resize = Callable[[Array, Array], Array]  # (their table, our fresh one) -> a table of our shape


@dataclass(frozen=True)
class Start:
    """Params and buffers of step 0, taken from a run or from a checkpoint of another library.

    source  the directory of a run, one that `sslx export` wrote, or a Hugging Face checkpoint
    step    of a run: which of its checkpoints; the newest by default
    names   pairs (theirs, ours) of branches of {"params": ..., "buffers": ...}: a run of BYOL has
            its slow encoder at "buffers/target/params/encoder". A branch of ours that several pairs
            fill gets the last
    resize  pairs (pattern, rule) for tables of another number of rows: the first pattern that
            matches the whole path says how a table becomes one of our shape. The default keeps
            the learned positions of a text encoder and leaves those beyond as they were drawn

    What is not taken, on either side, is said. Where a run is resumed, nothing is read.
    """

    source: str | os.PathLike
    step: int | None = None
    names: tuple[tuple[str, str], ...] = ALL
    resize: tuple[tuple[str, Resize], ...] = ((r"(.*/)?position/table", extended),)

    def __post_init__(self):
        object.__setattr__(self, "source", os.fspath(self.source))
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.names):
            raise ValueError(f"names={self.names}: a tuple of pairs (theirs, ours).")

    def __call__(self, params: Params, buffers: Buffers) -> tuple[Params, Buffers]:
        """`params` and `buffers` with what the source holds in place of their own values.

        Every array keeps its sharding. Raises ValueError where a pair of names, or the whole
        source, has nothing for this run, or where a shape differs and no rule says what to do.
        """
        state = {"params": params, "buffers": buffers}
        theirs = self.read()
        ours = {path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(state)}
        pairs = {}
        for their, our in self.names:
            paths = [path for path in theirs if path == their or path.startswith(f"{their}/")]
            found = {our + path[len(their) :]: path for path in paths}
            found = {our: path for our, path in found.items() if our in ours}
            if not found and (self.names != ALL or their == "params"):
                raise ValueError(
                    f"{self.source} has nothing of {their} for {our} of this run: it holds "
                    f"{branches(theirs)}, and the run {branches(ours)}; say which branch is which, "
                    f"names=((theirs, ours), ...)."
                )
            pairs |= found
        arrays = {our: self.fitted(our, theirs[their], ours[our]) for our, their in pairs.items()}
        self.report(ours.keys() - pairs.keys(), theirs.keys() - set(pairs.values()))
        state = jax.tree_util.tree_map_with_path(lambda k, x: arrays.get(path_of(k), x), state)
        return state["params"], state["buffers"]

    def read(self) -> dict[str, np.ndarray]:
        """Every array of the source by its path, such as "params/encoder/class"."""
        source = place(self.source)
        if not source.is_dir():
            raise ValueError(f"There is no directory {source} to start from.")
        if (source / "checkpoints").is_dir():
            tree = checkpoint.load(source / "checkpoints", self.step)
            state = {name: tree.get(name, {}) for name in ("params", "buffers")}
        elif isinstance(source, Remote):
            raise ValueError(f"{source} is no run: copy it to a directory here to start from it.")
        else:
            saved = hf.read(source)
            state = {"params": saved.params, "buffers": saved.buffers}
        return {path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(state)}

    def fitted(self, path: str, theirs: np.ndarray, ours: Array) -> Array:
        """Their array with the shape, dtype and sharding of ours."""
        if bad := theirs.size - np.count_nonzero(np.isfinite(theirs)):
            raise ValueError(
                f"{path} in {self.source} has {bad:,} values of {theirs.size:,} that are NaN or "
                f"infinite: the model diverged; start from an earlier step of it."
            )
        if jax.dtypes.issubdtype(ours.dtype, jax.dtypes.prng_key):  # stored as plain numbers
            numbers = self.fitted(path, theirs, jax.random.key_data(ours))
            return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(ours))
        if path.endswith("word/table") and len(theirs) != len(ours):
            theirs = theirs[: used(theirs)]
        if path.endswith(WORDS) and padded(len(theirs)) == len(ours):
            theirs = np.pad(theirs, [(0, len(ours) - len(theirs)), (0, 0)][: theirs.ndim])
        if theirs.shape == ours.shape:
            if path.endswith("word/table") and (there := used(theirs)) != (here := used(ours)):
                log.warning(
                    "%s: %s has %d words and this run %d: are they of one tokenizer?",
                    *(self.source, path, there, here),
                )
            return placed(theirs.astype(ours.dtype), ours.sharding)
        there, here = list(theirs.shape), list(ours.shape)
        rules = [rule for pattern, rule in self.resize if re.fullmatch(pattern, path)]
        if not rules:
            raise ValueError(
                f"{path} is {there} in {self.source} and {here} in this run: build the model of "
                f"that size, leave the branch out of names, or give a rule, "
                f"resize=((pattern, rule), ...)."
            )
        shape = jax.eval_shape(rules[0], theirs, ours).shape
        if shape != ours.shape:
            raise ValueError(
                f"resize makes {path} {list(shape)} of {list(theirs.shape)} in {self.source}, but "
                f"this run has {list(ours.shape)}: give another rule."
            )
        log.info("%s: %s is resized from %s to %s", self.source, path, there, here)
        whole = jax.sharding.NamedSharding(ours.sharding.mesh, jax.sharding.PartitionSpec())
        resized = jax.jit(rules[0], out_shardings=ours.sharding)
        return resized(placed(theirs.astype(ours.dtype), whole), ours)

    def report(self, missing: set[str], unused: set[str]) -> None:
        """Say which arrays of the run start at random, and which of the source are not used."""
        if jax.process_index():
            return
        for paths, what in ((missing, "lacks"), (unused, "has, beside what is used,")):
            if paths:
                log.warning("%s %s %s", self.source, what, branches(dict.fromkeys(sorted(paths))))


def used(table: Array | np.ndarray) -> int:
    """The rows of a table without those of zeros at its end, which padding appends."""
    return int(((np.arange(len(table)) + 1) * table.astype(bool).any(1)).max(initial=0))


def placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> Array:
    """A host array that every process holds, as one sharded array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def branches(paths: Mapping[str, object], most: int = 6) -> str:
    """The first few of many paths, shortened to three levels, and how many there are."""
    short = list(dict.fromkeys("/".join(path.split("/")[:3]) for path in paths))
    rest = f" and {len(short) - most} more branches" if len(short) > most else ""
    return (", ".join(short[:most]) or "nothing") + rest
