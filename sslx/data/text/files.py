"""Files of text -> spans of them -> the bytes and lines that begin there.

A span is the unit of work: a small file, a byte range of a large one (a line belongs to where it
begins), or rows of Parquet.
"""

import codecs
import contextlib
import errno
import logging
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

from sslx.data.source import DataError, matches, needs

log = logging.getLogger("sslx")

GROUP = 8  # parts of a row group at most: each reads it from its beginning
BLOCK = 1 << 20  # bytes read at once
STEP = 1 << 14  # bytes of a .gz file inflated at once, to a thousand times as many at most
ROW = 1 << 28  # bytes of a line of JSON at most
SWELL = 200  # times its own size that a .gz file holds at most, beyond ROW; text is at 2 to 20
PLAIN = (".txt", ".txt.gz")
SUFFIXES = (*PLAIN, ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
DAMAGED = (EOFError, zlib.error)  # what a .gz file raises


@dataclass(frozen=True)
class Span:
    """A stretch of a file: bytes, or rows of Parquet. `size` is about its bytes of text."""

    path: str
    begin: int
    end: int
    size: int


def files(source: str) -> list[str]:
    """A file, the files of a glob, or all under a folder, sorted.

    Links are followed, and each folder is read once; hidden names are left out. What is passed over
    is counted and named in the log.
    """
    root = os.path.expanduser(source)
    if not os.path.isdir(root):
        return [root] if os.path.isfile(root) else matches("text", source)
    paths, names_of, over = [], {}, {}
    walk = os.walk(root, onerror=lambda e: over.update({e.filename: e.strerror}), followlinks=True)
    for folder, inner, names in walk:
        name = names_of.setdefault(os.path.realpath(folder), folder)
        if name != folder:
            over[folder] = f"the same as {name}"
            inner.clear()
            continue
        hidden = [name for name in (*inner, *names) if name[0] == "."]
        over |= {os.path.join(folder, name): "hidden" for name in hidden}
        inner[:] = sorted(name for name in inner if name[0] != ".")
        paths += [os.path.join(folder, name) for name in names if name[0] != "."]
    if over:
        few = "; ".join(f"{name} ({reason})" for name, reason in sorted(over.items())[:3])
        log.warning("%s: passed over %d names: %s", source, len(over), few)
    if not paths:
        raise DataError(f"{root} is an empty folder")
    return sorted(paths)


def suffix(path: str) -> str:
    """The one of SUFFIXES that a name ends with, in whatever case; "" if it has another."""
    name = path.lower()
    return next((known for known in SUFFIXES if name.endswith(known)), "")


def size_of(path: str) -> int:
    """The bytes of a file. Raises DataError if it is no file, or is not ours to read."""
    try:
        about = os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EACCES):
            raise  # a disk in trouble is no reason to leave files out
        raise DataError(f"cannot be opened, it or what it links to: {error.strerror}") from error
    if not stat.S_ISREG(about.st_mode):
        raise DataError("is no file, but a pipe, a socket or a device")
    if not os.access(path, os.R_OK):
        raise DataError("cannot be opened: its permissions forbid it")
    return about.st_size


def spans(path: str, size: int) -> list[Span]:
    """A file in stretches of at most `size` where it can be cut. Raises DataError if unreadable."""
    kind, length = suffix(path), size_of(path)
    if not kind:
        raise DataError(f"is none of {', '.join(SUFFIXES)}")
    if kind == ".parquet":
        return parquet_spans(path, size)
    if kind.endswith(".gz"):
        return [Span(path, 0, length, 3 * length)]  # cannot be entered in the middle
    begins = range(0, length, size) or [0]
    ends = [min(begin + size, length) for begin in begins]
    return [Span(path, b, e, e - b) for b, e in zip(begins, ends, strict=True)]


def parquet_file(path: str):
    """A ParquetFile, whatever bytes its name is of."""
    source = needs("pyarrow", "pyarrow").OSFile(os.fsencode(path))
    reader = needs("pyarrow.parquet", "pyarrow").ParquetFile
    return reader(source, buffer_size=BLOCK, pre_buffer=False)


def parquet_spans(path: str, size: int) -> list[Span]:
    arrow = needs("pyarrow", "pyarrow")
    try:
        with parquet_file(path) as file:
            schema, footer = file.schema_arrow, file.metadata
    except (arrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
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


# ---- what a span holds ----


def first(span: Span) -> int:
    """Where the first line begins that begins within the span; a place behind it if none does."""
    if not span.begin:
        return 0
    with open(span.path, "rb") as file:
        file.seek(span.begin - 1)
        line = file.readline(BLOCK)
        while line and not line.endswith(b"\n") and file.tell() < span.end:
            line = file.readline(BLOCK)
        return file.tell()


def blocks(span: Span) -> Iterator[bytes]:
    """The lines that begin within the span, about BLOCK bytes at a time."""
    if suffix(span.path).endswith(".gz"):
        yield from inflated(span.path)
        return
    with open(span.path, "rb") as file:
        file.seek(first(span))
        data, left = b"\n", span.end - file.tell()
        while left > 0 and (data := file.read(min(BLOCK, left))):
            left -= len(data)
            yield data
        while data and not data.endswith(b"\n"):
            data = file.readline(BLOCK)
            yield data


def inflated(path: str) -> Iterator[bytes]:
    """What a .gz file holds, up to the byte where it is damaged; then raises one of DAMAGED."""
    left, member = max(ROW, SWELL * os.path.getsize(path)), None
    with open(path, "rb") as file:
        while data := file.read(STEP):
            while data := data if member else data.lstrip(b"\0"):  # padding between members
                member = member or zlib.decompressobj(31)
                before = member.copy()
                try:
                    block = member.decompress(data)
                except zlib.error:  # with it went what is whole: once more, until it fails
                    yield from (before.decompress(data[i : i + 1]) for i in range(len(data)))
                    raise
                yield block
                if (left := left - len(block)) < 0:
                    raise zlib.error(
                        f"it swells {SWELL} times, as no text does; if it is sound, unpack it"
                    )
                data, member = member.unused_data, None if member.eof else member
    if member:
        raise EOFError("it ends before its end mark")


def misnamed(path: str) -> str:
    """Why a file is not written as its name says, "" if it is."""
    kind = suffix(path)
    with open(path, "rb") as file:
        start = file.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "is UTF-16: convert it with iconv -f UTF-16 -t UTF-8"
    if start and (start == b"\x1f\x8b") != kind.endswith(".gz"):
        return (
            "is not gzipped, but named .gz" if kind.endswith(".gz") else "is gzipped: name it .gz"
        )
    if kind not in (".json", ".json.gz"):
        return ""
    block = b""
    with contextlib.suppress(*DAMAGED):  # its rows say so
        block = next(blocks(Span(path, 0, BLOCK, BLOCK)), b"")
    line, more, _ = block.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not line or (line.startswith(b"{") and (not more or line.rstrip().endswith(b"}"))):
        return ""
    return "is one JSON document, not one in each line: jq -c '.[]' cuts an array"


def lines(span: Span) -> Iterator[tuple[int, bytes | None]]:
    """Each line and where it begins; None for one of more than ROW bytes."""
    at, held, size = first(span), [], 0
    for block in chain(blocks(span), [b"\n"]):
        *ended, rest = block.split(b"\n")
        for line in ended:
            size += len(line)
            yield at, b"".join([*held, line]) if size <= ROW else None
            at, held, size = at + size + 1, [], 0
        size += len(rest)
        held.append(rest)
        if size > ROW:
            held.clear()
