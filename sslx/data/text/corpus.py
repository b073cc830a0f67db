"""A corpus: files -> spans of them -> the documents that begin there, in pieces.

A document is a row of .jsonl or .parquet (string `text`), or a whole .txt file; both text formats
may be .gz. What cannot be read is dropped and named, with the reason, in a Tally.
"""

import codecs
import gzip
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

from sslx.data.source import DataError, Record, matches, needs

GROUP = 8  # parts of a row group at most: each reads it from its beginning
BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 16  # characters of a longer document encoded at once
ROW = 1 << 28  # bytes of a line of .jsonl at most
NAMED = 100  # dropped records named for each shard; all are counted
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Span:
    """A stretch of a file: bytes, or rows of Parquet. `size` is about its bytes of text."""

    path: str
    begin: int
    end: int
    size: int


@dataclass
class Tally:
    """What was read, and what was not: `dropped` names the first NAMED, `counts` has them all."""

    counts: Counter = field(default_factory=Counter)
    dropped: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, reason: str) -> None:
        self.counts["dropped"] += 1
        if len(self.dropped) < NAMED:
            self.dropped[name] = reason


def files(source: str) -> list[str]:
    """A file, the files of a glob, or all under a folder but hidden ones; sorted."""
    root = os.path.expanduser(source)
    if not os.path.isdir(root):
        return matches("text", source)
    paths = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name[0] != "."]
        paths += [os.path.join(folder, name) for name in names if name[0] != "."]
    if not paths:
        raise DataError(f"{root} is an empty folder")
    return sorted(paths)


def spans(path: str, size: int) -> list[Span]:
    """A file in stretches of at most `size` where it can be cut. Raises DataError if unreadable."""
    length = os.path.getsize(path)
    if not path.endswith(SUFFIXES):
        raise DataError(f"is none of {', '.join(SUFFIXES)}")
    if path.endswith(".gz"):
        return [Span(path, 0, length, 3 * length)]  # cannot be entered in the middle
    if not path.endswith(".parquet"):
        begins = range(0, length, size) or [0]
        ends = [min(begin + size, length) for begin in begins]
        return [Span(path, b, e, e - b) for b, e in zip(begins, ends, strict=True)]
    arrow = needs("pyarrow", "pyarrow")
    try:
        with needs("pyarrow.parquet", "pyarrow").ParquetFile(path) as file:
            schema, footer = file.schema_arrow, file.metadata
    except arrow.ArrowInvalid as error:
        raise DataError(f"is not Parquet, or damaged: {error}") from error
    k = schema.get_field_index("text")
    if k < 0 or schema.field(k).type not in (arrow.string(), arrow.large_string()):
        columns = ", ".join(f"{c.name}: {c.type}" for c in schema)
        raise DataError(f"has no column `text` of strings, only {columns}")
    leaves = [footer.schema.column(i).path for i in range(footer.num_columns)]
    stretches, at = [], 0
    for group in map(footer.row_group, range(footer.num_row_groups)):
        n, held = group.num_rows, group.column(leaves.index("text")).total_uncompressed_size
        few = max(1, min(n, GROUP, -(-held // size)))
        cuts = [at + n * i // few for i in range(few + 1)]
        stretches += [Span(path, *ends, held // few) for ends in pairwise(cuts)]
        at += n
    return stretches or [Span(path, 0, 0, 0)]


def partition(paths: list[str], size: int) -> tuple[list[list[Span]], dict[str, str]]:
    """Consecutive spans of together at most `size`, and the files that cannot be read."""
    parts, filled, dropped = [[]], 0, {}
    for path in paths:
        try:
            stretches = spans(path, size)
        except DataError as error:
            dropped[path] = str(error)
            continue
        for span in stretches:
            if parts[-1] and filled + span.size > size:
                parts.append([])
                filled = 0
            parts[-1].append(span)
            filled += span.size
    return parts, dropped


def first(span: Span) -> int:
    """Where the first line begins that begins within the span, or after it."""
    if not span.begin:
        return 0
    with open(span.path, "rb") as file:
        file.seek(span.begin - 1)
        while (line := file.readline(BLOCK)) and not line.endswith(b"\n"):
            pass
        return file.tell()


def blocks(span: Span) -> Iterator[bytes]:
    """The lines that begin within the span, BLOCK bytes at a time."""
    gzipped = span.path.endswith(".gz")
    with (gzip.open if gzipped else open)(span.path, "rb") as file:
        file.seek(first(span))
        data, left = b"\n", sys.maxsize if gzipped else span.end - file.tell()
        while left > 0 and (data := file.read(min(BLOCK, left))):
            left -= len(data)
            yield data
        while data and not data.endswith(b"\n"):
            data = file.readline(BLOCK)
            yield data


def fault(span: Span) -> str:
    """Why a span of plain text cannot be used, "" if it can: read ahead, so that a file which ends
    in rubbish is not half used."""
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
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
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
    """Rows of .jsonl or .parquet with a string `text` that is not blank, and their `name`."""
    read = parquet_rows if span.path.endswith(".parquet") else json_rows
    try:
        for name, row in read(span, columns):
            text = row.get("text") if isinstance(row, dict) else row
            if not isinstance(text, str):
                reason = f"is damaged: {text}" if isinstance(text, Exception) else "has no `text`"
                tally.drop(name, reason)
            elif not text.strip():
                tally.counts["empty"] += 1
                tally.drop(name, "is empty")
            else:
                yield {column: row.get(column) for column in columns} | {"name": name}
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        tally.drop(span.path, f"is damaged, what comes before is kept: {error}")


def json_rows(span: Span, columns) -> Iterator[tuple[str, Any]]:
    del columns
    at, rest = first(span), b""
    for block in chain(blocks(span), [b"\n"]):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > ROW:
            yield f"{span.path}@{at}", ValueError(f"a line of more than {ROW >> 20} MiB")
            return
        for line in lines:
            if line.strip():
                try:
                    row = json.loads(line)
                    str(row.get("text")).encode()  # fails on half of a surrogate pair
                except (ValueError, AttributeError) as error:
                    row = error
                yield f"{span.path}@{at}", row
            at += len(line) + 1


def parquet_rows(span: Span, columns) -> Iterator[tuple[str, Any]]:
    arrow, reader = needs("pyarrow", "pyarrow"), needs("pyarrow.parquet", "pyarrow").ParquetFile
    with reader(span.path, buffer_size=BLOCK, pre_buffer=False) as file:
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
            except (arrow.ArrowInvalid, OSError) as error:  # pages that do not unpack
                if getattr(error, "errno", None):
                    raise
                yield f"{span.path}#{at}", error


def texts(span: Span, tally: Tally) -> Iterator[tuple[str, bool]]:
    """Pieces of documents, and whether a document begins with this one."""
    if not span.path.endswith((".txt", ".txt.gz")):
        for row in rows(span, tally):
            tally.counts["documents"] += 1
            for k, piece in enumerate(pieces(row["text"])):
                yield piece, k == 0
        return
    reason, begins = fault(span), span.begin == 0
    if reason == "is empty" and not begins:
        return  # the middle of one long line, or blank lines
    if reason:
        tally.counts["empty"] += reason == "is empty"
        tally.drop(span.path if begins else f"{span.path}@{span.begin}", reason)
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
