"""Sources of text: windows that were tokenized before, or documents tokenized as they are read.

    Tokens     the folder that `sslx tokenize` wrote, for training
    Text       labelled documents, one a record, for probes
    PyDocs     the text that ships with Python, tokenized on first use

Their records are of tokens, and a Window decodes them.
"""

import ast
import functools
import json
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data.corpus import Tally, fault, files, plain, rows, spans
from sslx.data.sources import RESIDENT, DataError, Record, Shards, Source
from sslx.data.tokenize import Window, tokenize, width
from sslx.data.tokenizers import digest, tokenizer, tokenizer_digest, tokenizer_file, vocabulary
from sslx.vocabulary import Vocabulary

log = logging.getLogger("sslx")


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
        if tokenizer_digest(self.folder) != self.manifest["tokenizer"]:
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
    resident = True

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

    @functools.cached_property
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
    had, read = source.vocabulary, decode.vocabulary
    if had.special != read.special or had.size > read.size:  # a small corpus fills fewer ids
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
            found = [text for node in documented(tree) if (text := ast.get_docstring(node))]
            if found:
                yield name.as_posix(), "\n\n".join(found)


def documented(tree: ast.Module) -> Iterator[ast.AST]:
    """What can have a docstring, in the order of the source; expressions cannot."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, kinds):
            yield node
        inner = (ast.stmt, ast.excepthandler, ast.match_case)
        left += [x for x in ast.iter_child_nodes(node) if isinstance(x, inner)][::-1]
