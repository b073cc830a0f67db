"""Vocabularies: the number of token ids, and which are special."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Vocabulary:
    """A batch's `tokens` are below `size`. What sslx trains itself has special ids 0 to 4."""

    size: int
    pad: int = 0
    unknown: int = 1
    start: int = 2  # [CLS], <s>
    end: int = 3  # [SEP], </s>
    mask: int = 4

    @property
    def special(self) -> tuple[int, ...]:
        return (self.pad, self.unknown, self.start, self.end, self.mask)


NAMES = {  # how the fields of a Vocabulary are written: BERT's way, RoBERTa's
    "pad": ("[PAD]", "<pad>"),
    "unknown": ("[UNK]", "<unk>"),
    "start": ("[CLS]", "<s>"),
    "end": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}

IDS = 1 << 24  # more than any vocabulary has

BERT = Vocabulary(30_522, pad=0, unknown=100, start=101, end=102, mask=103)
ROBERTA = Vocabulary(50_265, pad=1, unknown=3, start=0, end=2, mask=50_264)


@dataclass(frozen=True)
class Continuations:
    """Which ids continue a word; printed and compared by their number and digest."""

    count: int
    digest: str
    bits: bytes = field(repr=False)

    @classmethod
    def of(cls, ids: np.ndarray) -> "Continuations":
        """Of a boolean for every id."""
        bits = np.packbits(ids).tobytes()
        return cls(int(ids.sum()), hashlib.sha256(bits).hexdigest()[:12], bits)

    @classmethod
    def read(cls, tokenizer: Path | str) -> "Continuations":
        """Of a `tokenizer.json`: WordPiece marks what continues a word, byte-level BPE (and
        SentencePiece) what begins one. Raises ValueError where it has no words with ids.
        """
        try:
            described = json.loads(Path(tokenizer).read_text(encoding="utf-8"))
            return cls.of(_continuing(described["model"], described.get("added_tokens", ())))
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ValueError(
                f"{tokenizer} does not describe words and their ids ({type(error).__name__}: "
                f"{error}): copy it again, or take another tokenizer."
            ) from error

    def table(self, size: int) -> np.ndarray:
        """A boolean for each of `size` ids."""
        ids = np.unpackbits(np.frombuffer(self.bits, np.uint8)).astype(bool)
        return np.pad(ids[:size], (0, max(0, size - len(ids))))


def _continuing(model: Any, added: Any) -> np.ndarray:
    """A boolean for every id of a tokenizer's model and its special words."""
    words, special = model["vocab"], {word["id"] for word in added}
    words = {w: i for i, (w, _) in enumerate(words)} if isinstance(words, list) else words
    prefix = model.get("continuing_subword_prefix") if model["type"] == "WordPiece" else None
    used = (*words.values(), *special)
    if not 0 <= min(used) <= max(used) < IDS:
        raise ValueError(f"ids from {min(used)} to {max(used)}")
    ids = np.zeros(max(used) + 1, bool)
    for word, i in words.items():
        begins = not word.startswith(prefix) if prefix else word.startswith(("Ġ", "▁", "Ċ"))
        ids[i] = not begins and i not in special
    return ids
