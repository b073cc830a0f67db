"""Parts of a source: every n-th record, or all the others."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslx.data.source import DataError, Shapes, Source, warned
from sslx.data.uri import open_uri

HELD_OUT = 20  # one record of so many


@dataclass(frozen=True)
class Part(Source):
    """Every n-th record of a source, from its first on, or with `rest` all but those.

    So the two have no record in common, and classes that lie one after another are in both.
    """

    source: str | Source
    every: int
    rest: bool = False

    def __post_init__(self):
        if self.every < 2:
            raise DataError(f"every={self.every}: a part is every 2nd record or fewer")

    @functools.cached_property
    def whole(self) -> Source:
        return open_uri(self.source) if isinstance(self.source, str) else self.source

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "source":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.whole, name)  # its tokenizer's path, its vocabulary

    def __str__(self) -> str:
        kind = (
            f"all but every {self.every}th record" if self.rest else f"every {self.every}th record"
        )
        return f"{self.source} ({kind})"

    def __len__(self) -> int:
        held = -(-len(self.whole) // self.every)
        return len(self.whole) - held if self.rest else held

    def number(self, index):
        """The number in the whole source of a record, or those of an array of them."""
        return index + index // (self.every - 1) + 1 if self.rest else index * self.every

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.whole[self.number(index)]

    def records(self, indices: list[int]):
        return self.whole.records([self.number(index) for index in indices])

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.whole.gather(self.number(indices))

    @property
    def classes(self) -> list[str]:
        return self.whole.classes

    @property
    def unlabelled(self) -> str:
        return self.whole.unlabelled

    @property
    def shapes(self) -> Shapes:
        return self.whole.shapes

    @property
    def leaves(self) -> tuple[str, ...]:
        return self.whole.leaves

    @property
    def decoder(self) -> str:
        return self.whole.decoder

    @property
    def resident(self) -> bool:
        return self.whole.resident

    def listings(self) -> dict[str, Any]:
        return {"whole": self.whole, "listings": self.whole.listings()}

    def adopt(self, listings: dict[str, Any]) -> None:
        vars(self)["whole"] = listings["whole"]  # not opened here, which lists
        self.whole.adopt(listings["listings"])

    def check(self) -> None:
        self.whole.check()
        super().check()
        if self.rest:
            warned(f"every {self.every}th record of {self.source} is held out, to evaluate on")

    def suits(self, decode) -> None:
        self.whole.suits(decode)


def train_and_test(
    data: str | Source, test: str | Source, published: tuple[str, str]
) -> tuple[str | Source, str | Source]:
    """The training and the test set of a recipe.

    `test` as given; that of `published` = (data, test), where the data are; else a share of the
    data is held out.
    """
    if test or data == published[0]:
        return data, test or published[1]
    return Part(data, HELD_OUT, rest=True), Part(data, HELD_OUT)
