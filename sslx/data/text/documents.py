"""Labelled documents that are tokenized as they are read, for probes."""

import functools
import logging
import os
import sys
from dataclasses import dataclass

import numpy as np

from sslx.data.source import RESIDENT, DataError, Record, Source
from sslx.data.text.corpus import Tally, fault, plain, rows
from sslx.data.text.files import PLAIN, files, spans, suffix
from sslx.data.text.tokenizers import tokenizer, vocabulary, warn_of_unknown
from sslx.data.text.windows import same_vocabulary, width
from sslx.vocabulary import Vocabulary

log = logging.getLogger("sslx")

SAMPLE = 64  # documents that are tokenized at once to see whether the tokenizer fits them


@dataclass(frozen=True)
class Text(Source):
    """Documents tokenized as they are read, one a record, for probes on labelled text.

    `tokenizer` is a tokenizer.json, a folder with one, or the source whose tokenizer it is. The
    text is held in memory; a larger set is for `sslx tokenize`. Labels: an integer column `label`.
    """

    glob: str
    tokenizer: str | Source
    leaves = ("tokens", "starts")
    decoder = "Window(length, vocabulary)"
    resident = True

    @functools.cached_property
    def documents(self) -> list[Record]:
        paths, tally, documents = files(self.glob), Tally(), []
        size = sum(map(os.path.getsize, paths))
        if size > RESIDENT:
            raise DataError(f"{self.glob} holds {size >> 20} MiB: `sslx tokenize` it, tokens:DIR")
        for path in paths:
            try:
                stretches = spans(path, sys.maxsize)
            except DataError as error:
                tally.drop(path, str(error))
                continue
            for span in stretches:
                if suffix(path) not in PLAIN:
                    documents += rows(span, tally, ("text", "label"))
                elif reason := fault(span):
                    tally.drop(path, reason)
                else:
                    documents.append({"text": "".join(plain(span)), "name": path})
        for name, reason in tally.dropped.items():
            log.warning("dropped %s: it %s", name, reason)
        if (more := tally.counts["dropped"] - len(tally.dropped)) > 0:
            log.warning("dropped %d more of %s", more, self.glob)
        for row in documents:
            label = row.get("label")
            if label is None:
                row.pop("label", None)
            elif not isinstance(label, int):
                raise DataError(f"{row['name']}: label {label!r}: labels are integers from 0")
        return documents

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
