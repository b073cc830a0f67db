"""Windows of tokens: documents packed into them, their bytes on disk, and how to decode these."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import ClassVar

import numpy as np

from sslx.data.source import DataError, Record, Shapes, Source
from sslx.vocabulary import Vocabulary

SHORTEST = 16  # positions of a window below which a document is not begun that must be cut


def packed(stream: Iterable[tuple[np.ndarray, bool]], length: int) -> Iterator[list[np.ndarray]]:
    """(ids of a piece, whether a document begins) -> windows, each a list of its documents' ids.

    Each document takes two positions more than it has tokens. Nothing is lost, and cuts depend on
    the documents alone, not on how they come in pieces.
    """
    shortest, nothing = min(SHORTEST, length) - 2, np.zeros(0, np.int64)
    window, room, tail = [], length - 2, nothing
    for ids, begins in chain(stream, [(nothing, True)]):
        ended = tail if begins else nothing
        tail = ids if begins or not len(tail) else np.concatenate([tail, ids])
        for left, least in ((ended, 1), (tail, length - 1)):  # what goes on waits for a whole one
            while len(left) >= least:
                if window and len(left) > room and room < shortest:
                    yield window
                    window, room = [], length - 2
                window.append(left[:room])
                left = left[room:]
                room -= len(window[-1]) + 2
                if room < 1:
                    yield window
                    window, room = [], length - 2
        tail = left
    if window:
        yield window


def record(window: list[np.ndarray], vocabulary: Vocabulary) -> bytes:
    """Number of documents, where each starts, ids: all uint16, or uint32 for large vocabularies."""
    n, sizes = len(window), [len(ids) + 2 for ids in window]
    starts = list(accumulate(sizes, initial=0))
    codes = np.empty(1 + n + starts[-1], width(vocabulary))
    codes[0], codes[1 : 1 + n] = n, starts[:-1]
    tokens = codes[1 + n :]
    for ids, start in zip(window, starts, strict=False):
        tokens[start] = vocabulary.start
        tokens[start + 1 : start + 1 + len(ids)] = ids
        tokens[start + 1 + len(ids)] = vocabulary.end
    return codes.tobytes()


def width(vocabulary: Vocabulary) -> np.dtype:
    return np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Window:
    """Decode a record into tokens int32 [L] and segments int32 [L].

    `segments` is a token's document within the window, from 1; 0 where padded. Positions count
    from 0 at the window's start, as in BERT's and RoBERTa's packed training. A longer text, which
    only `text:` gives, is cut off at `length` and ends with [end].
    """

    length: int
    vocabulary: Vocabulary
    reads: ClassVar[tuple[str, ...]] = ("tokens", "starts")

    def __post_init__(self):
        check_length(self.length)

    def __call__(
        self, record: Record, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        ids, starts = record["tokens"], record["starts"]
        tokens = np.full(self.length, self.vocabulary.pad, np.int32)
        segments = np.zeros(self.length, np.int32)
        n = min(len(ids), self.length)
        tokens[:n], segments[starts] = ids[:n], 1
        np.cumsum(segments[:n], out=segments[:n])
        if n < len(ids):
            tokens[-1] = self.vocabulary.end
        return {"tokens": tokens, "segments": segments}

    @property
    def shapes(self) -> Shapes:
        """Shape and dtype of what an example holds, known before any record is read."""
        return {"tokens": ((self.length,), np.int32), "segments": ((self.length,), np.int32)}


def check_length(length: int) -> None:
    if not 8 <= length < 1 << 16:
        raise DataError(f"a window of {length} tokens: lengths are from 8 to 65,535")


def same_vocabulary(source: Source, decode: Window) -> None:
    """Raise DataError where a source's tokens are not of the vocabulary that `decode` reads."""
    had, read = source.vocabulary, decode.vocabulary
    if had.special != read.special or had.size > read.size:  # a small corpus fills fewer ids
        raise DataError(
            f"{source} has {source.vocabulary} but the recipe reads {decode.vocabulary}: tokenize "
            "with the recipe's tokenizer, or give the recipe this vocabulary"
        )
