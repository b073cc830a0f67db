"""Raw text -> windows of tokens, once; windows -> batches, as often as training likes.

    plan       files are cut into parts of about equal size: whole small files, byte ranges of large
               ones (a line belongs to where it begins), rows of Parquet
    write      each part becomes one shard, alone: so parts run in any process, on any host, in any
               order, and a part that is written need not be written again
    finish     when every shard is there, a manifest says what they hold

A document is a row of .jsonl or .parquet (string `text`), or a whole .txt file; both text formats
may be .gz. A window is filled as RoBERTa's "full sentences" are (arXiv:1907.11692, 4.2): documents
one after another, across their ends. Unlike there each has its own [start] and [end] and attends
to itself alone, and one too long is cut between any two tokens, as BERT cuts, and goes on in the
next window; only room of less than SHORTEST positions is padded instead.

The same files, tokenizer and length give the same bytes, whatever the number of processes.
"""

import ast
import codecs
import functools
import gzip
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import threading
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sslx.data.pipeline import cores, end_with_parent, spawning
from sslx.data.sources import RESIDENT, DataError, Record, Shards, Source, matches, needs
from sslx.vocabulary import Vocabulary

log = logging.getLogger("sslx")
Kind = Literal["wordpiece", "bpe"]
Said = Callable[[int, int], None]  # (bytes done, bytes in all), for a progress bar

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of what is trained here
NAMES = {  # of a Vocabulary's fields: BERT's, RoBERTa's
    "pad": ("[PAD]", "<pad>"),
    "unknown": ("[UNK]", "<unk>"),
    "start": ("[CLS]", "<s>"),
    "end": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
PART = 8 << 20  # bytes of a part; doubled until there are at most PARTS
PARTS = 512  # readers keep as many files open
GROUP = 8  # parts of a row group at most: each reads it from its beginning
SAMPLE = 1 << 30  # characters that a tokenizer is trained on, spread over the corpus
ALPHABET = 1000  # characters of WordPiece, the most frequent ones; others are unknown
SHORTEST = 16  # positions of a window below which a document is not begun that must be cut
BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 16  # characters of a longer document encoded at once
BATCH = 1 << 19  # characters encoded together
ROW = 1 << 28  # bytes of a line of .jsonl at most
NAMED = 100  # dropped records named for each shard; all are counted
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


# ---- tokenizers ----


def train_tokenizer(texts: Callable[[], Iterable[str]], size: int, kind: Kind = "wordpiece"):
    """A `tokenizers.Tokenizer` of at most `size` ids trained on texts(), which is read twice.

    wordpiece  BERT's, lower case, without accents, of the ALPHABET most frequent characters
    bpe        byte-level, RoBERTa's: every text has an exact and reversible spelling
    """
    models, pre = hugging("models"), hugging("pre_tokenizers")
    trainers, normal = hugging("trainers"), hugging("normalizers")
    decoders, Tokenizer = hugging("decoders"), hugging("tokenizers").Tokenizer
    if size <= len(SPECIAL) + 256 * (kind == "bpe"):
        raise DataError(f"a {kind} vocabulary of {size} holds no words: BERT has 30,522")
    if kind == "bpe":
        tokenizer, options = Tokenizer(models.BPE()), {"min_frequency": 2, "show_progress": False}
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre.ByteLevel.alphabet()),
            **options,
        )
        tokenizer.train_from_iterator(texts(), trainer)
    else:
        found = trained_wordpiece(texts, size)
        tokenizer = Tokenizer(models.WordPiece(found, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = (
            normal.BertNormalizer(),
            pre.BertPreTokenizer(),
        )
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = hugging("processors").TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def trained_wordpiece(texts, size: int) -> dict[str, int]:
    """Tokens -> ids. The library numbers the letters within words (`##a`) in the order of a hash
    table, which differs from process to process, and breaks ties between merges by number; so they
    are numbered here, as if they were special, and the same text gives the same vocabulary."""
    models, pre = hugging("models"), hugging("pre_tokenizers")
    normalizer = hugging("normalizers").BertNormalizer()
    raw, counts = Counter(), Counter()
    for text in texts():
        raw.update(text)
    for letter, count in raw.items():
        for x in normalizer.normalize_str(letter):
            counts[x] += 0 if x.isspace() else count
    letters = sorted(counts, key=lambda x: (-counts[x], x))
    letters = sorted(x for x in letters[:ALPHABET] if counts[x])
    within = [
        f"##{x}"
        for x in letters  # punctuation is always a word of its own
        if (x.isalnum() if x.isascii() else unicodedata.category(x)[0] != "P")
    ]
    tokenizer = hugging("tokenizers").Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre.BertPreTokenizer()
    trainer = hugging("trainers").WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*SPECIAL, *within],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer.get_vocab()


def tokenizer(path: str):
    """The tokenizer of a tokenizer.json or of the folder that holds one, for text as it stands:
    without the truncation and padding that files bring along, and `[MASK]` written in a text is no
    mask token."""
    file = tokenizer_file(path)
    return loaded(file, os.stat(file).st_mtime_ns)


@functools.lru_cache(maxsize=8)
def loaded(file: str, modified: int):
    del modified  # a file that is replaced is read again
    try:
        found = hugging("tokenizers").Tokenizer.from_file(file)
    except DataError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file} is no tokenizer of Hugging Face tokenizers: {error}") from error
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True
    return found


def vocabulary(path: str) -> Vocabulary:
    """How many ids a tokenizer has, and which are special, by BERT's or RoBERTa's names."""
    ids, special = tokenizer(path).get_vocab(with_added_tokens=True), {}
    for what, names in NAMES.items():
        found = [ids[name] for name in names if name in ids]
        if not found:
            raise DataError(
                f"{tokenizer_file(path)} has no {what} token, neither {' nor '.join(names)}: "
                "masked language modeling needs it; add it to the file's added_tokens, or train "
                "one: sslx tokenize SOURCE OUT --vocab N"
            )
        special[what] = found[0]
    return Vocabulary(max(ids.values()) + 1, **special)


def hugging(name: str):
    """A module of Hugging Face tokenizers."""
    return needs("tokenizers" if name == "tokenizers" else f"tokenizers.{name}", "tokenizers")


def tokenizer_file(path: str) -> str:
    path = os.path.expanduser(path)
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise DataError(f"{file} is missing: name a tokenizer.json, or a folder that holds one")
    return file


# ---- reading ----


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
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name[0] != "."]
        found += [os.path.join(folder, name) for name in names if name[0] != "."]
    if not found:
        raise DataError(f"{root} is an empty folder")
    return sorted(found)


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
    found, at = [], 0
    for group in map(footer.row_group, range(footer.num_row_groups)):
        n, held = group.num_rows, group.column(leaves.index("text")).total_uncompressed_size
        few = max(1, min(n, GROUP, -(-held // size)))
        cuts = [at + n * i // few for i in range(few + 1)]
        found += [Span(path, *ends, held // few) for ends in pairwise(cuts)]
        at += n
    return found or [Span(path, 0, 0, 0)]


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
    """Why a stretch of plain text is of no use, "" if it is: read ahead, so that a file which ends
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
    """A stretch of a text file, in pieces."""
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
    found, at = [], 0
    while len(text) - at >= PIECE:
        part = LAST.match(text, at, at + PIECE)
        end = part.end() if part else at + PIECE
        found.append(text[at:end])
        at = end
    return [*found, text[at:]]


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


# ---- packing ----


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
    found = np.empty(1 + n + starts[-1], width(vocabulary))
    found[0], found[1 : 1 + n] = n, starts[:-1]
    tokens = found[1 + n :]
    for ids, start in zip(window, starts, strict=False):
        tokens[start] = vocabulary.start
        tokens[start + 1 : start + 1 + len(ids)] = ids
        tokens[start + 1 + len(ids)] = vocabulary.end
    return found.tobytes()


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

    def __post_init__(self):
        check_length(self.length)

    def __call__(self, record: Record) -> dict[str, np.ndarray]:
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
    def shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and dtype of what an example holds, known before any record is read."""
        return {"tokens": ((self.length,), np.int32), "segments": ((self.length,), np.int32)}


def check_length(length: int) -> None:
    if not 8 <= length < 1 << 16:
        raise DataError(f"a window of {length} tokens: lengths are from 8 to 65,535")


# ---- writing ----


@dataclass(frozen=True)
class Job:
    """Tokenize `source` into the folder `out`: what any process on any host needs to do its part.

    `out` has a tokenizer.json before the first part is written. Pickles with the plan, once made.
    """

    source: str
    out: str
    length: int = 128
    part: int | None = None  # bytes; None chooses

    def __post_init__(self):
        check_length(self.length)

    @functools.cached_property
    def plan(self) -> tuple[list[list[Span]], dict[str, str]]:
        """The parts, and the files that are in none, with the reason."""
        paths = files(self.source)
        total, size = sum(map(os.path.getsize, paths)), self.part or PART
        while self.part is None and total > PARTS * size:
            size *= 2
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

    @property
    def parts(self) -> list[list[Span]]:
        return self.plan[0]

    def settings(self) -> dict[str, Any]:
        """What the bytes of the shards depend on, but for the tokenizer."""
        stretches = [(span.path, span.begin, span.end) for part in self.parts for span in part]
        folders = {os.path.dirname(path) for path, *_ in stretches}
        root = os.path.commonpath(folders) if folders else ""  # the whole corpus may move
        told = [(os.path.relpath(path, root or "."), *ends) for path, *ends in stretches]
        told = json.dumps([told, list(map(len, self.parts))])
        return {"format": 1, "length": self.length, "source": digest(told.encode())}

    def shard(self, k: int) -> Path:
        return Path(self.out) / f"tokens-{k:05d}-of-{len(self.parts):05d}.array_record"

    def done(self, k: int) -> dict[str, Any] | None:
        """What is known of shard k, if it is written and whole."""
        about = self.shard(k).with_suffix(".json")
        if not about.exists():
            return None
        about, file = json.loads(about.read_text()), self.shard(k)
        size = file.stat().st_size if file.exists() else 0
        return about if size == about["bytes"] else None

    def write(self, k: int, said: Callable[[int], None] = lambda count: None) -> None:
        """Write part k as a shard, under another name until it is whole. Memory stays flat."""
        tally, ids = Tally(), tokenizer(self.out)
        special, part = vocabulary(self.out), self.parts[k]
        told = 0

        def encoded():
            nonlocal told
            stream = (pair for span in part for pair in texts(span, tally))
            for batch in batched(stream, BATCH):
                codes = ids.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
                for code, (_, begins) in zip(codes, batch, strict=True):
                    found = np.array(code.ids, width(special))
                    tally.counts["tokens"] += len(found)
                    tally.counts["unknown"] += int((found == special.unknown).sum())
                    yield found, begins
                count = sum(len(text) for text, _ in batch)
                told += count
                said(count)

        writer = needs("array_record.python.array_record_module", "array_record").ArrayRecordWriter
        path, new = self.shard(k), self.shard(k).with_suffix(".new")
        file = None
        for window in packed(encoded(), self.length):
            file = file or writer(str(new), "group_size:1,uncompressed")
            file.write(record(window, special))
            tally.counts["windows"] += 1
            tally.counts["segments"] += len(window)
        if file:  # a part without text has no shard
            file.close()
            verify(new, tally.counts["windows"])
            new.replace(path)
        said(sum(span.size for span in part) - told)
        about = {"bytes": path.stat().st_size if file else 0, "counts": dict(tally.counts)}
        write_json(path.with_suffix(".json"), about | {"dropped": tally.dropped})

    def finish(self) -> dict[str, Any] | None:
        """Write and return the manifest, or None while parts are missing."""
        known = [self.done(k) for k in range(len(self.parts))]
        if None in known:
            return None
        counts, dropped = Counter(dropped=len(self.plan[1])), dict(self.plan[1])
        shards = []
        for k, about in enumerate(known):
            counts.update(about["counts"])
            dropped |= about["dropped"]
            if windows := about["counts"].get("windows", 0):
                row = {"name": self.shard(k).name, "bytes": about["bytes"], "windows": windows}
                shards.append(row)
        if not shards:
            few = "; ".join(f"{name} {reason}" for name, reason in list(dropped.items())[:3])
            raise DataError(f"{self.source} holds no text: {few}")
        special = vocabulary(self.out)
        manifest = {
            **self.settings(),
            "vocabulary": asdict(special),
            "tokenizer": digest(Path(tokenizer_file(self.out)).read_bytes()),
            "counts": {name: counts[name] for name in COUNTS},
            "shards": shards,
            "dropped": dropped,
        }
        write_json(Path(self.out) / "manifest.json", manifest)
        return manifest

    def sample(self) -> Iterator[str]:
        """Text to train a tokenizer on: of every part its beginning, SAMPLE characters in all."""
        total = sum(span.size for part in self.parts for span in part)
        for part in self.parts:
            room = SAMPLE * sum(span.size for span in part) // max(1, total)
            for text, _ in (pair for span in part for pair in texts(span, Tally())):
                yield text
                room -= len(text)
                if room < 0:
                    break


COUNTS = ("documents", "tokens", "unknown", "windows", "segments", "empty", "dropped")


def tokenize(
    source: str,
    out: str,
    *,
    vocabulary_size: int | None = None,
    tokenizer: str | None = None,
    kind: Kind = "wordpiece",
    length: int = 128,
    workers: int | None = None,
    process: tuple[int, int] = (0, 1),
    part: int | None = None,
    said: Said = lambda done, total: None,
) -> dict[str, Any] | None:
    """Write `source` as windows of tokens under `out`; interrupted, the same call goes on.

    The tokenizer is trained on the source, or copied from a tokenizer.json. `process` (i, n) does
    every n-th part from part i on, for a corpus that is spread over machines which share `out`.
    Returns the manifest, or None if other processes have not finished.
    """
    job = Job(source, os.path.expanduser(out), length, part)
    index, count = process
    if not 0 <= index < count:
        raise DataError(f"process {index} of {count}: processes count from 0")
    if count > 1 and tokenizer is None:
        raise DataError("several processes need one tokenizer: train it first, then --tokenizer F")
    if tokenizer is None:
        size = vocabulary_size or {"wordpiece": 30_522, "bpe": 50_265}[kind]
        asked = {"kind": kind, "vocabulary_size": size}
    else:
        vocabulary(tokenizer)  # has a mask token, before anything is written
        data = Path(tokenizer_file(tokenizer)).read_bytes()
        asked = {"tokenizer": digest(data)}
    claim(job, asked)
    home = Path(job.out) / "tokenizer.json"
    if tokenizer is not None:
        write_whole(home, data)
    elif not home.exists():
        trained = train_tokenizer(job.sample, size, kind)
        write_whole(home, trained.to_str(pretty=True).encode())
    todo = range(index, len(job.parts), count)
    sizes = {k: sum(span.size for span in job.parts[k]) for k in todo}
    left = [k for k in todo if job.done(k) is None]
    run(
        job,
        left,
        sum(sizes.values()) - sum(sizes[k] for k in left),
        sum(sizes.values()),
        workers,
        said,
    )
    return job.finish()


def claim(job: Job, asked: dict[str, Any]) -> None:
    """Make the folder this job's; raise if it is another's."""
    path, ours = Path(job.out) / "job.json", job.settings() | asked
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if changed:
            raise DataError(
                f"{job.out} was begun with another {', '.join(changed)}: remove it, or name "
                "another folder"
            )
        return
    if os.path.isdir(job.out) and os.listdir(job.out):
        raise DataError(f"{job.out} holds other files: name a new folder")
    Path(job.out).mkdir(parents=True, exist_ok=True)
    write_json(path, ours)


def run(job: Job, left: list[int], done: int, total: int, workers: int | None, said: Said) -> None:
    """Write the parts `left` in processes, the next one free the next part; 0 for none but this."""
    workers = min(cores() if workers is None else workers, len(left))

    def add(count: int) -> None:
        nonlocal done
        done += count
        said(done, total)

    add(0)
    if workers < 2:
        for k in left:
            job.write(k, add)
        return
    context = multiprocessing.get_context("spawn")
    told, turn, errors = context.Value("q", done), context.Value("q", 0), context.SimpleQueue()
    crew = [
        context.Process(target=labor, args=(job, left, turn, told, errors), daemon=True)
        for _ in range(workers)
    ]
    with spawning():
        for worker in crew:
            worker.start()
    try:
        while any(worker.is_alive() for worker in crew):
            for worker in crew:
                worker.join(0.1 / workers)
            said(min(told.value, total), total)
            if not errors.empty():
                raise errors.get()
            if any(worker.exitcode for worker in crew):
                raise DataError(
                    "a worker was killed, perhaps for memory: the same command goes on; "
                    f"fewer than {workers} workers need less"
                )
    finally:
        for worker in crew:
            worker.kill()  # they hear nothing else; what they had not finished is written again
            worker.join()


def labor(job: Job, left: list[int], turn, told, errors) -> None:
    """In a worker: parts, until none is left."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()

    def add(count: int) -> None:
        with told.get_lock():
            told.value += count

    try:
        while True:
            with turn.get_lock():
                k, turn.value = turn.value, turn.value + 1
            if k >= len(left):
                return
            job.write(left[k], add)
    except Exception as error:
        errors.put(error)


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


def verify(path: Path, windows: int) -> None:
    """Raise if a shard does not hold what was written: a full disk tells nobody else."""
    if Shards([str(path)]).ends[-1] != windows:
        raise OSError(f"{path} does not hold its {windows} windows: is the disk full?")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """All or nothing; two processes may write the same at once."""
    new = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.new")
    new.write_bytes(data)
    new.replace(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


# ---- sources ----


@dataclass(frozen=True)
class Tokens(Source):
    """Windows that `sslx tokenize` wrote: {"tokens", "starts", "name"}, checked by its manifest."""

    path: str
    gives = "tokens"
    resident = True  # a window is decoded in microseconds: no worker repays its start

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        file = Path(self.folder) / "manifest.json"
        if file.exists():
            return json.loads(file.read_text())
        if (Path(self.folder) / "job.json").exists():
            raise DataError(f"{self.folder} is unfinished: run the same `sslx tokenize` again")
        raise DataError(f"{file} is missing: name a folder that `sslx tokenize` wrote")

    @property
    def folder(self) -> str:
        return os.path.expanduser(self.path)

    @property
    def length(self) -> int:
        return self.manifest["length"]

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(**self.manifest["vocabulary"])

    @property
    def window(self) -> Window:
        """How to decode these records: Pipeline(source, source.window)."""
        return Window(self.length, self.vocabulary)

    @functools.cached_property
    def shards(self) -> Shards:
        return Shards([os.path.join(self.folder, row["name"]) for row in self.manifest["shards"]])

    @functools.cached_property
    def total(self) -> int:
        return sum(row["windows"] for row in self.manifest["shards"])

    def check(self):
        for row in self.manifest["shards"]:
            path = os.path.join(self.folder, row["name"])
            size = os.path.getsize(path) if os.path.exists(path) else None
            if size != row["bytes"]:
                state = "is missing" if size is None else f"has {size} of {row['bytes']} bytes"
                raise DataError(
                    f"{path} {state}: copy it again, or run the same `sslx tokenize` again, which "
                    "writes only what is not there"
                )
        if digest(Path(tokenizer_file(self.folder)).read_bytes()) != self.manifest["tokenizer"]:
            raise DataError(
                f"{tokenizer_file(self.folder)} is not the tokenizer that these windows were "
                "written with: put that one back, or tokenize again"
            )

    def suits(self, decode):
        super().suits(decode)
        same_vocabulary(self, decode)
        if decode.length != self.length:
            raise DataError(
                f"{self.folder} was tokenized into windows of {self.length} but the recipe reads "
                f"{decode.length}: take length {self.length}, or tokenize with --length "
                f"{decode.length}"
            )

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        return self.records([index])[0]

    def records(self, indices):
        kind, found = width(self.vocabulary), []
        for data, name in self.shards.read(indices):
            codes = np.frombuffer(data, kind)
            n = 1 + int(codes[0])
            found.append({"tokens": codes[n:], "starts": codes[1:n], "name": name})
        return found


@dataclass(frozen=True)
class Text(Source):
    """Documents tokenized as they are read, one a record, for probes on labelled text.

    `tokenizer` is a tokenizer.json, a folder with one, or the source whose tokenizer it is. The
    text is held in memory; a larger set is for `sslx tokenize`. Labels: an integer column `label`.
    """

    glob: str
    tokenizer: str | Source
    gives = "tokens"

    @functools.cached_property
    def documents(self) -> list[Record]:
        paths, tally, found = files(self.glob), Tally(), []
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
                if not path.endswith((".txt", ".txt.gz")):
                    found += rows(span, tally, ("text", "label"))
                elif reason := fault(span):
                    tally.drop(path, reason)
                else:
                    found.append({"text": "".join(plain(span)), "name": path})
        for name, reason in tally.dropped.items():
            log.warning("dropped %s: it %s", name, reason)
        if (more := tally.counts["dropped"] - len(tally.dropped)) > 0:
            log.warning("dropped %d more of %s", more, self.glob)
        for row in found:
            label = row.get("label")
            if label is None:
                row.pop("label", None)
            elif not isinstance(label, int):
                raise DataError(f"{row['name']}: label {label!r}: labels are integers from 0")
        return found

    @property
    def path(self) -> str:
        return self.tokenizer if isinstance(self.tokenizer, str) else self.tokenizer.path

    @property
    def vocabulary(self) -> Vocabulary:
        return vocabulary(self.path)

    def check(self):
        _ = self.vocabulary
        super().check()

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
        found, first = [], np.zeros(1, np.int64)
        for row, code in zip(rows, codes, strict=True):
            ids = np.array([special.start, *code.ids, special.end], width(special))
            row = {name: value for name, value in row.items() if name != "text"}
            found.append(row | {"tokens": ids, "starts": first})
        return found


def same_vocabulary(source: Tokens | Text, decode: Window) -> None:
    if decode.vocabulary != source.vocabulary:
        raise DataError(
            f"{source} has {source.vocabulary} but the recipe reads {decode.vocabulary}: tokenize "
            "with the recipe's tokenizer, or give the recipe this vocabulary"
        )


# ---- the text that ships with Python ----


@dataclass(frozen=True)
class PyDocs(Source):
    """English about Python: the help topics and the standard library's docstrings, tokenized on
    first use into the user's cache, which the version of Python and the settings name."""

    split: str
    vocabulary_size: int
    length: int
    gives = "tokens"
    resident = True

    @functools.cached_property
    def tokens(self) -> Tokens:
        if self.split not in ("train", "test"):
            raise DataError(f"pydocs has no split {self.split!r}: use train or test")
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        version = ".".join(map(str, sys.version_info[:3]))
        name = f"pydocs-{version}-{self.vocabulary_size}-{self.length}"
        folder = Path(home) / "sslx" / name
        if not folder.is_dir():
            tokenize_pydocs(folder, self.vocabulary_size, self.length)
        return Tokens(str(folder / self.split))

    @property
    def path(self) -> str:
        """The folder of the windows and of their tokenizer."""
        return self.tokens.path

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokens.vocabulary

    @property
    def window(self) -> Window:
        """How to decode these records; known before any is written."""
        return Window(self.length, Vocabulary(self.vocabulary_size))

    def check(self):
        self.tokens.check()

    def suits(self, decode):
        self.tokens.suits(decode)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index]

    def records(self, indices):
        return self.tokens.records(indices)


def pydocs(split: str = "train", vocabulary_size: int = 8192, length: int = 128) -> Source:
    """Nine tenths of the documents are "train", the rest, chosen by their names, "test"."""
    return PyDocs(split, vocabulary_size, length)


def tokenize_pydocs(folder: Path, vocabulary_size: int, length: int) -> None:
    """Both splits with the tokenizer of the training split; appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    log.info("tokenizing Python's own documentation into %s, once", folder)
    try:
        for name, text in python_documents():
            split = "train" if int(digest(name.encode())[:8], 16) % 10 else "test"
            with open(new / f"{split}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"text": text}) + "\n")
        kept = {"length": length, "workers": 0}
        tokenize(f"{new}/train.jsonl", f"{new}/train", vocabulary_size=vocabulary_size, **kept)
        tokenize(f"{new}/test.jsonl", f"{new}/test", tokenizer=f"{new}/train", **kept)
        for split in ("train", "test"):
            (new / f"{split}.jsonl").unlink()
        new.chmod(0o755)  # mkdtemp's are private
        try:
            new.replace(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)  # another process was first, or nothing came of it


def python_documents() -> Iterator[tuple[str, str]]:
    """(name, text): each help topic, and the docstrings of each module of the standard library in
    the order of its source. Nothing is imported: sources are parsed."""
    root = Path(sysconfig.get_path("stdlib"))
    tests = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if tests & set(name.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old spellings in strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a few are examples of that
        if name.as_posix() == "pydoc_data/topics.py":
            [table] = [node.value for node in tree.body if isinstance(node, ast.Assign)]
            for topic, text in ast.literal_eval(table).items():
                yield f"topic {topic}", text
        else:
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
            nodes.sort(key=lambda node: getattr(node, "lineno", 0))
            found = [text for node in nodes if (text := ast.get_docstring(node))]
            if found:
                yield name.as_posix(), "\n\n".join(found)
