"""Arrays in memory, of any modality."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslx.data.source import DataError, Shapes, Source

RESERVED = ("name", "valid", "dropped")  # what the pipeline adds to a record or batch
NARROW = {"f": np.float32, "i": np.int32, "u": np.uint32}  # what accelerators compute in


class Column:
    """An array that prints, compares and hashes by its shape, dtype and content's digest."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.blake2b(np.ascontiguousarray(self.array), digest_size=6).hexdigest()

    def __repr__(self) -> str:
        return f"{self.array.dtype}{list(self.array.shape)} {self.digest}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Column) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class Arrays(Source):
    """Records that are the rows of arrays: see `arrays`, which makes it."""

    columns: tuple[tuple[str, Column], ...]
    resident = True

    @functools.cached_property
    def table(self) -> dict[str, np.ndarray]:
        return {name: column.array for name, column in self.columns}

    @property
    def leaves(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.columns)

    @property
    def shapes(self) -> Shapes:
        return {name: (x.shape[1:], x.dtype) for name, x in self.table.items() if name != "label"}

    def __len__(self):
        return len(self.columns[0][1].array)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return {name: x[index] for name, x in self.table.items()} | {"name": f"arrays#{index}"}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: x[indices] for name, x in self.table.items()}


def arrays(**columns: Any) -> Source:
    """A source of in-memory arrays by the names of their leaves: arrays(image=X, label=y).

    Axis 0 of every array is the example; `label`, whole numbers, is for probes alone. 64-bit
    numbers become 32-bit ones, as on the device. Arrays are not copied: do not change them after
    this. Raises DataError for no arrays, for other lengths, and for what holds no numbers or such
    as 32 bits do not hold.
    """
    if not set(columns) - {"label"}:
        raise DataError("arrays() needs at least one array to train on, as in arrays(image=X)")
    if bad := set(columns) & set(RESERVED):
        raise DataError(
            f"arrays(): {', '.join(sorted(bad))} is a name that the pipeline uses itself"
        )
    made = {name: numeric(name, array) for name, array in columns.items()}
    lengths = {name: len(array) for name, array in made.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"arrays() of different lengths: {lengths}; axis 0 is the example")
    return Arrays(tuple((name, Column(array)) for name, array in made.items()))


def numeric(name: str, given: Any) -> np.ndarray:
    """An array 32 bits wide at most; raises DataError where it is no batch of numbers."""
    if isinstance(given, np.ma.MaskedArray):
        raise DataError(f"arrays({name}=...) has masked values: fill them, array.filled(0)")
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise DataError(f"arrays({name}=...) is no array: {error}") from error
    kind = array.dtype.kind
    if array.ndim < 1 or kind not in "biuf":
        raise DataError(
            f"arrays({name}=...) is {array.dtype} {list(array.shape)}: numbers with the example as "
            "axis 0 are needed"
        )
    if name == "label" and (array.ndim != 1 or kind not in "iu"):
        raise DataError(f"label is {array.dtype} {list(array.shape)}: one whole number each")
    dtype = NARROW[kind] if array.dtype.itemsize > 4 else array.dtype.newbyteorder("=")
    if kind in "iu" and array.size:
        limits = np.iinfo(np.int32 if name == "label" else dtype)
        for value in (array.min(), array.max()):
            if not limits.min <= value <= limits.max:
                raise DataError(f"arrays({name}=...) holds {value}, more than 32 bits hold")
    try:
        with np.errstate(over="raise"):
            return array.astype(dtype, copy=False)
    except FloatingPointError as error:
        raise DataError(f"arrays({name}=...) holds more than float32 does: {error}") from error
