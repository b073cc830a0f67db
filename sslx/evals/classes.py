"""Classes by name: a label is a number, and what it means is for its own data set to say."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sslx.evals.features import Features


def numbering(train: Sequence[str], test: Sequence[str]) -> list[int]:
    """The number in `train` of each class of `test`, by their names; empty if either has none.

    Names may differ in their case and in what is between words. Raises ValueError, with the names
    of both, for a class that training lacks, or has twice.
    """
    if not train or not test:
        return []
    if list(train) == list(test):  # which may use a name twice, as ImageNet does
        return list(range(len(train)))
    exact, loose = known(train), known(map(plain, train))
    numbers = [exact.get(name, loose.get(plain(name), -1)) for name in test]
    unknown = [name for name, number in zip(test, numbers, strict=True) if number < 0]
    if unknown:
        raise ValueError(
            f"The test set has classes that training lacks, or has twice: {few(unknown)}. "
            f"Training has {few(sorted(train))}; the test set has {few(sorted(test))}."
        )
    return numbers


def renumbered(test: Features, numbers: Sequence[int]) -> Features:
    """The features with the labels that `numbering` gives; without numbers as they are."""
    if not numbers:
        return test
    if (most := int(test.label.max())) >= len(numbers):
        raise ValueError(f"The test set has a label {most} but names {len(numbers)} classes only.")
    return Features(test.x, np.where(test.label < 0, -1, np.array(numbers, np.int32)[test.label]))


def known(names) -> dict[str, int]:
    """The number of each name, without those that stand there twice."""
    names = list(names)
    counts = Counter(names)
    return {name: k for k, name in enumerate(names) if counts[name] == 1}


def plain(name: str) -> str:
    """A name without case, and with one kind of space between words."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name).casefold()).strip()


def few(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
