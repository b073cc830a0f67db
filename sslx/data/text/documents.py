"""Labelled documents that are tokenized as they are read, for probes."""

import functools
import logging
import sys
from dataclasses import dataclass
from operator import index

import numpy as np

from sslx.data.formats.parquet import class_names
from sslx.data.source import RESIDENT, DataError, Record, Source
from sslx.data.text.corpus import Tally, fault, plain, rows
from sslx.data.text.files import PLAIN, files, parquet_file, partition, suffix
from sslx.data.text.tokenizers import tokenizer, vocabulary, warn_of_unknown
from sslx.data.text.windows import same_vocabulary, width
from sslx.vocabulary import Vocabulary

log = logging.getLogger("sslx")

BEYOND = 1 << 31  # labels are below
SAMPLE = 64  # documents that are tokenized at once to see whether the tokenizer fits them


@dataclass(frozen=True)
class Text(Source):
    """Documents tokenized as they are read, one a record, for probes on labelled text.

    `tokenizer` is a tokenizer.json, a folder with one, or the source whose tokenizer it is. The
    text is held in memory; a larger set is for `sslx tokenize`. Labels are a column `label` of
    integers, or of words, which are numbered in the order of the alphabet.
    """

    glob: str
    tokenizer: str | Source
    leaves = ("tokens", "starts")
    decoder = "Window(length, vocabulary)"
    resident = True

    @functools.cached_property
    def read(self) -> list[Record]:
        """The documents, each with its text, name and label as they stand in the files."""
        tally, documents, held = Tally(), [], 0
        [stretches], dropped = partition(files(self.glob), sys.maxsize)
        if sum(span.size for span in stretches) > RESIDENT:
            raise self.too_large

        def kept(text: str) -> str:  # a .gz file may hold far more than its size
            nonlocal held
            if (held := held + len(text)) > RESIDENT:
                raise self.too_large
            return text

        for span in stretches:
            if suffix(span.path) not in PLAIN:
                found = rows(span, tally, ("text", "label"))
                documents += (row | {"text": kept(row["text"])} for row in found)
            elif reason := fault(span):
                tally.drop(span.path, reason)
            else:
                text = "".join(map(kept, plain(span)))
                documents.append({"text": text, "name": span.path})
        for path, reason in dropped.items():
            tally.drop(path, reason)
        for name, reason in tally.dropped.items():
            log.warning("dropped %s: it %s", name, reason)
        if (more := tally.counts["dropped"] - len(tally.dropped)) > 0:
            log.warning("dropped %d more of %s", more, self.glob)
        return documents

    @functools.cached_property
    def words(self) -> list[str]:
        """The words that are labels, whose numbers are their places."""
        return sorted({x for row in self.read if isinstance(x := row.get("label"), str)})

    @functools.cached_property
    def classes(self) -> list[str]:
        """Words that are labels, or what a ClassLabel of Parquet files calls the numbers; raises
        DataError where two files differ."""
        if self.words:
            return self.words
        known: dict[str, list[str]] = {}
        for path in {row["name"].rpartition("#")[0] for row in self.read}:
            if suffix(path) == ".parquet":
                with parquet_file(path) as file:
                    known[path] = class_names(file.schema_arrow.metadata or {})
        if len(set(map(tuple, known.values()))) > 1:
            raise DataError(
                f"{self.glob}: its files name other classes: {known}; write them alike, or make "
                "each kind a source of its own"
            )
        return next(iter(known.values()), [])

    @functools.cached_property
    def documents(self) -> list[Record]:
        """The documents with labels from 0, and without one where it is null or below 0."""
        documents, numbers = [], {word: k for k, word in enumerate(self.words)}
        for row in self.read:
            label, row = row.get("label"), {name: row[name] for name in ("text", "name")}
            try:
                number = -1 if label is None else numbers[label] if numbers else index(label)
            except (LookupError, TypeError):
                number = BEYOND
            if number >= BEYOND:
                raise DataError(
                    f"{row['name']}: label {label!r}: labels are integers from 0, or words, in all "
                    "rows alike"
                )
            if self.classes and number >= len(self.classes):
                raise DataError(
                    f"{row['name']}: label {number}, but {self.glob} names {len(self.classes)} "
                    "classes only, which count from 0"
                )
            documents.append(row if number < 0 else row | {"label": number})
        return documents

    @functools.cached_property
    def unlabelled(self):
        labelled = any("label" in row for row in self.documents)
        return "" if labelled else "no row has a column `label`, in lower case, with a label in it"

    @property
    def too_large(self) -> DataError:
        return DataError(
            f"{self.glob} holds more than {RESIDENT >> 20} MiB of text: `sslx tokenize` it, and "
            "read tokens:DIR"
        )

    @property
    def path(self) -> str:
        return self.tokenizer if isinstance(self.tokenizer, str) else self.tokenizer.path

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return vocabulary(self.path)

    def check(self):
        unknown = self.vocabulary.unknown
        super().check()
        few = self.records(list(range(0, len(self), -(-len(self) // SAMPLE))))
        ids = np.concatenate([record["tokens"][1:-1] for record in few])
        warn_of_unknown(self.glob, int((ids == unknown).sum()), len(ids))

    def suits(self, decode):
        super().suits(decode)
        same_vocabulary(self, decode)

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.records([index])[0]

    def records(self, indices):
        if not all(0 <= index < len(self) for index in indices):
            raise IndexError(f"records {indices} of {len(self)}")
        rows, special = [self.documents[index] for index in indices], self.vocabulary
        codes = tokenizer(self.path).encode_batch_fast(
            [row["text"] for row in rows], add_special_tokens=False
        )
        records, first = [], np.zeros(1, np.int64)
        for row, code in zip(rows, codes, strict=True):
            ids = np.array([special.start, *code.ids, special.end], width(special))
            row = {name: value for name, value in row.items() if name != "text"}
            records.append(row | {"tokens": ids, "starts": first})
        return records
