"""Arrays of safetensors files: their headers are read at once, their values when asked for."""

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sslx.export.fields import read_json, shown
from sslx.export.keymaps import listed

log = logging.getLogger("sslx")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F16", "BF16", "F32", "F64")
# Numbers that torch counts or enumerates: no model's outputs depend on them.
COUNTERS = re.compile(r"(.*\.)?(num_batches_tracked|position_ids)")


@dataclass(frozen=True)
class Stored:
    """An array in a file, of which the header alone has been read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, I8
    opened: Any  # safetensors' file

    def read(self) -> np.ndarray:
        """The array in float32; raises ValueError where it is of another kind, or not finite."""
        if self.dtype not in FLOATS:
            raise ValueError(
                f"{self.name} in {self.file} is of type {self.dtype}, and weights are read from "
                f"{', '.join(FLOATS)}: save the model in floating point, not quantized."
            )
        with readable(self.file), np.errstate(over="ignore", invalid="ignore"):
            array = np.asarray(self.opened.get_tensor(self.name), np.float32)
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            raise ValueError(
                f"{self.name} in {self.file} has {bad:,} values of {array.size:,} that are NaN or "
                f"infinite in float32: the model diverged, or the file is damaged."
            )
        return array


class Weights(Mapping):
    """Arrays by name, float32 and finite, each read when it is asked for.

    A name may stand for several stored arrays, such as tied weights: reading it raises ValueError
    where they differ.
    """

    def __init__(self, stored: Mapping[str, list[Stored]]):
        self.stored = stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, name: str) -> np.ndarray:
        first, *copies = self.stored[name]
        array = first.read()
        for copy in copies:
            if not np.array_equal(array, copy.read()):
                raise ValueError(
                    f"{first.name} and {copy.name} in {copy.file} differ, but sslx computes with "
                    f"one array for both: the model's outputs would be others."
                )
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name][0].shape

    @property
    def total(self) -> int:
        """How many numbers all arrays hold: no size of their model exceeds it."""
        return sum(math.prod(x.shape) for copies in self.stored.values() for x in copies)

    def renamed(self, canonical: Callable[[str], str | None]) -> "Weights":
        """The same arrays by the names that `canonical` gives theirs.

        Those that it gives None are left out, and named in the log.
        """
        by_name: dict[str | None, list[Stored]] = {}
        for name, copies in self.stored.items():
            by_name.setdefault(canonical(name), []).extend(copies)
        unused = by_name.pop(None, [])
        if named := [x.name for x in unused if not COUNTERS.fullmatch(x.name)]:
            log.warning("%s: %s not used", unused[0].file.parent, listed(named))
        return Weights(by_name)


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """A context in which a file that cannot be read raises ValueError with its name."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is not whole ({error}): download it again.") from error


def stored_in(directory: Path) -> Weights:
    """All arrays of a checkpoint, in one file or in shards.

    Where both are there, the one file is read, as transformers does. Raises ValueError where none
    is, where a file is damaged, or where shards hold other arrays than their index says.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        weights = Weights({name: [x] for name, x in headers(single)})
    elif index.is_file():
        weights = sharded(index)
    elif pickles := sorted(path.name for path in directory.glob("*.bin")):
        raise ValueError(
            f"{directory} holds {listed(pickles)} only, a pickle, which can run any program when "
            f"it is opened: where that is safe, save it again with from_pretrained(DIR)."
            f"save_pretrained(DIR, safe_serialization=True) of its class in transformers, such as "
            f"ViTMAEForPreTraining or ResNetModel, or download the repository's safetensors."
        )
    else:
        raise ValueError(f"{directory} holds no {SINGLE}: it is not a checkpoint.")
    if not weights:
        raise ValueError(f"{directory} holds files of weights without arrays: download it again.")
    used = {x.file for copies in weights.stored.values() for x in copies}
    used |= set() if single in used else {index}
    if others := {*directory.glob("*.safetensors*")} - used:
        log.warning("%s: %s not used", directory, listed(sorted(x.name for x in others)))
    return weights


def sharded(index: Path) -> Weights:
    """The arrays of all shards that an index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map, {{array: file}}: download it again.")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.strip("."):
            raise ValueError(
                f"{index} places {listed([name])} in {shown(file)}: expected the name of a file "
                f"beside it."
            )
    weights = {}
    for file in sorted(set(places.values())):
        for name, array in headers(index.parent / file):
            if (place := places.get(name, "no file")) != file:
                raise ValueError(
                    f"{index.parent / file} holds {listed([name])}, which {index.name} places in "
                    f"{place}: the shards are of different models; download them again."
                )
            weights[name] = [array]
    if missing := sorted(places.keys() - weights.keys()):
        raise ValueError(
            f"{index} names {listed(missing)}, and its shards lack them: they are of different "
            f"models; download them again."
        )
    return Weights(weights)


def headers(file: Path) -> Iterator[tuple[str, Stored]]:
    """The arrays of a safetensors file by name, not read yet."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: download it again.")
    with readable(file):
        opened = safe_open(file, "np")
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            yield name, Stored(file, name, tuple(part.get_shape()), part.get_dtype(), opened)


def check_names(weights: Weights, expected: set[str], model: str) -> None:
    """Raise ValueError where the names are not those of a model."""
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unexpected:
        parts = [f"lacks {listed(missing)}"] * bool(missing)
        parts += [f"has {listed(unexpected)}, unknown to a {model}"] * bool(unexpected)
        raise ValueError(
            f"The checkpoint {' and '.join(parts)}: config.json describes another model, or only "
            f"a part of the model was saved."
        )
