"""A corpus: spans of files -> the documents that begin there, in pieces.

A document is a row of .jsonl, .json or .parquet (string `text`), or a whole .txt file; all but
Parquet may be .gz. What cannot be read is dropped and named, with the reason, in a Tally.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

from sslx.data.source import Record, needs
from sslx.data.text.files import (
    BLOCK,
    DAMAGED,
    PLAIN,
    ROW,
    Span,
    blocks,
    lines,
    misnamed,
    parquet_file,
    suffix,
)

PIECE = 1 << 16  # characters of a longer document encoded at once
NAMED = 100  # dropped records named for each shard; all are counted


@dataclass
class Tally:
    """What was read, and what was not: `dropped` names the first NAMED, `counts` has them all."""

    counts: Counter = field(default_factory=Counter)
    dropped: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, reason: str) -> None:
        self.counts["dropped"] += 1
        self.counts["empty"] += reason == "is empty"
        if len(self.dropped) < NAMED:
            self.dropped[name] = reason


def fault(span: Span) -> str:
    """Why a span of plain text cannot be used, "" if it can: read ahead, so that a file which ends
    in rubbish is not half used."""
    if reason := misnamed(span.path):
        return reason
    decoder, seen, blank = codecs.getincrementaldecoder("utf-8-sig")(), span.begin, True
    try:
        for block in blocks(span):
            if b"\0" in block:
                return f"is binary: a zero near byte {seen + block.index(0)}"
            text = decoder.decode(block)
            blank, seen = blank and not text.strip(), seen + len(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 near byte {seen + error.start}: convert it with iconv"
    except DAMAGED as error:
        return f"is damaged: {error}"
    return "is empty" if blank else ""


def plain(span: Span) -> Iterator[str]:
    """The text of a span of a plain file, in pieces."""
    decoder, text = codecs.getincrementaldecoder("utf-8-sig")(), ""
    for block in blocks(span):
        text += decoder.decode(block)
        *whole, text = pieces(text)
        yield from whole
    yield text


LAST = re.compile(r".+(?=\s\S)", re.S)


def pieces(text: str) -> list[str]:
    """A text in pieces of at most PIECE characters, each broken off before the last white space
    with a word behind it: encoded alone they are what the whole would be. One that has no white
    space is broken anywhere. The last piece is shorter than PIECE."""
    parts, at = [], 0
    while len(text) - at >= PIECE:
        part = LAST.match(text, at, at + PIECE)
        end = part.end() if part else at + PIECE
        parts.append(text[at:end])
        at = end
    return [*parts, text[at:]]


def rows(span: Span, tally: Tally, columns: tuple[str, ...] = ("text",)) -> Iterator[Record]:
    """Rows of JSON or Parquet with a string `text` that is not blank, and their `name`."""
    read = parquet_rows if suffix(span.path) == ".parquet" else json_rows
    if read is json_rows and (reason := misnamed(span.path)):
        tally.drop(where(span), reason)
        return
    seen = kept = 0
    try:
        for name, row in read(span, columns):
            seen += 1
            if reason := lack(row):
                tally.drop(name, reason)
                continue
            kept += 1
            yield {column: row.get(column) for column in columns} | {"name": name}
    except DAMAGED as error:
        tally.drop(span.path, f"is damaged, the {kept:,} rows before that are kept: {error}")
    else:
        if not (seen or span.begin):
            tally.drop(span.path, "is empty")


def where(span: Span) -> str:
    """The name of a span, for messages."""
    return f"{span.path}@{span.begin}" if span.begin else span.path


def lack(row: Any) -> str:
    """Why a row is no document, "" if it is one."""
    if isinstance(row, Exception):
        return f"is damaged: {row}"
    if not isinstance(row, dict):
        return f"is no object with a `text`, but of type {type(row).__name__}"
    if not isinstance(row.get("text"), str):
        had = ", ".join(f"{name}: {type(value).__name__}" for name, value in row.items())
        return f"has no `text` that is a string, only {had[:200] or 'nothing'}"
    return "" if row["text"].strip() else "is empty"


def json_rows(span: Span, columns) -> Iterator[tuple[str, Any]]:
    del columns
    for at, line in lines(span):
        if line is None or line.strip():
            yield f"{span.path}@{at}", json_row(line)


def json_row(line: bytes | None) -> Any:
    """What a line of JSON says, or an exception that says what is wrong with it."""
    if line is None:
        return ValueError(f"a line of more than {ROW >> 20} MiB")
    try:
        row = json.loads(line.decode("utf-8-sig"))  # bytes would be read as UTF-16, too
        if isinstance(row, dict):
            str(row.get("text")).encode()  # fails on half of a surrogate pair
        return row
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 10) :][:30]
        return ValueError(f"{error.msg} at character {error.pos}, near {near!r}")
    except RecursionError:
        return ValueError("it is nested too deeply")
    except ValueError as error:
        return error


def parquet_rows(span: Span, columns) -> Iterator[tuple[str, Any]]:
    arrow = needs("pyarrow", "pyarrow")
    with parquet_file(span.path) as file:
        columns = [c for c in columns if c in file.schema_arrow.names]
        few = max(1, min(1024, 4 * BLOCK * (span.end - span.begin) // max(1, span.size)))
        ends = accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))
        for group, (at, end) in enumerate(pairwise(chain([0], ends))):
            if end <= span.begin or at >= span.end:
                continue
            try:
                for batch in file.iter_batches(few, [group], columns, use_threads=False):
                    for i in range(max(0, span.begin - at), min(batch.num_rows, span.end - at)):
                        try:
                            row = {c: batch.column(c)[i].as_py() for c in columns}
                        except UnicodeDecodeError as error:
                            row = error
                        yield f"{span.path}#{at + i}", row
                    at += batch.num_rows
                    if at >= span.end:
                        break
            except (arrow.ArrowException, OSError) as error:  # pages that do not unpack
                if getattr(error, "errno", None):
                    raise
                for i in range(max(at, span.begin), min(end, span.end)):
                    yield f"{span.path}#{i}", error


def texts(span: Span, tally: Tally) -> Iterator[tuple[str, bool]]:
    """Pieces of documents, and whether a document begins with this one."""
    if suffix(span.path) not in PLAIN:
        for row in rows(span, tally):
            tally.counts["documents"] += 1
            for k, piece in enumerate(pieces(row["text"])):
                yield piece, k == 0
        return
    reason, begins = fault(span), span.begin == 0
    if reason == "is empty" and not begins:
        return  # the middle of one long line, or blank lines
    if reason:
        tally.drop(where(span), reason)
        return
    tally.counts["documents"] += begins
    for k, piece in enumerate(plain(span)):
        yield piece, k == 0


def batched(stream: Iterable[tuple[str, bool]], size: int) -> Iterator[list[tuple[str, bool]]]:
    """Consecutive pieces of together about `size` characters."""
    batch, held = [], 0
    for pair in stream:
        batch.append(pair)
        held += len(pair[0])
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
