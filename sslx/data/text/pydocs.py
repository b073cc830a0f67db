"""The text that ships with Python, tokenized on first use."""

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

from sslx.data.source import DataError, Source
from sslx.data.text.folder import writing
from sslx.data.text.tokenize import tokenize
from sslx.data.text.tokenizers import digest
from sslx.data.text.tokens import Tokens
from sslx.data.text.windows import Window
from sslx.vocabulary import Vocabulary

log = logging.getLogger("sslx")


@dataclass(frozen=True)
class PyDocs(Source):
    """English about Python: the help topics and the standard library's docstrings, tokenized on
    first use into the user's cache, which the version of Python and the settings name."""

    split: str
    vocabulary_size: int
    length: int
    leaves = ("tokens", "starts")
    decoder = "Window(length, vocabulary)"
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


def tokenize_pydocs(folder: Path, vocabulary_size: int, length: int) -> None:
    """Both splits with the tokenizer of the training split; appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    log.info("tokenizing Python's own documentation into %s, once", folder)
    try:
        for name, text in python_documents():
            split = "train" if int(digest(name.encode())[:8], 16) % 10 else "test"
            path = new / f"{split}.jsonl"
            with writing(path), path.open("a", encoding="utf-8") as file:
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
            docstrings = [text for node in documented(tree) if (text := ast.get_docstring(node))]
            if docstrings:
                yield name.as_posix(), "\n\n".join(docstrings)


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
