"""Sources by name: `open_uri(uri)` for the command line, functions of the same names for recipes.

open_uri("parquet:~/data/train-*.parquet")  ==  parquet("~/data/train-*.parquet")
"""

import difflib
import re
from urllib.parse import parse_qs

from sslx.data.formats.arrayrecord import ArrayRecord
from sslx.data.formats.digits import Digits
from sslx.data.formats.folder import Folder
from sslx.data.formats.parquet import Parquet
from sslx.data.formats.tfds import TFDS
from sslx.data.source import DataError, Source
from sslx.data.text.documents import Text
from sslx.data.text.pydocs import PyDocs
from sslx.data.text.tokens import Tokens


def digits(split: str = "") -> Source:
    """scikit-learn's digits: "train" is the first 80 %, "test" the rest, "" both."""
    return Digits(split)


def parquet(glob: str) -> Source:
    """Column `image`, struct<bytes, path> or plain bytes; column `label`, whole numbers or words,
    where there is one."""
    return Parquet(glob)


def folder(path: str) -> Source:
    """One folder for each class, with all pictures below it, or one flat folder without labels."""
    return Folder(path)


def arrayrecord(glob: str) -> Source:
    """What write_arrayrecord wrote, or records that are encoded pictures."""
    return ArrayRecord(glob)


def tfds(name: str, split: str | None = None, data_dir: str | None = None) -> Source:
    """tfds("cifar10", "train"), or, as in a URI, tfds("cifar10:train?data_dir=DIR")."""
    if split is None:
        name, _, query = name.partition("?")
        parts = re.fullmatch(r"(.+):(\w+(?:\[[^]]*\])?(?:\+.*)?)", name)  # slices have colons too
        name, split = parts.groups() if parts else ("", "")
        data_dir = parse_qs(query).get("data_dir", [data_dir])[0]
        if not name or not split:
            raise DataError("a tfds source is tfds:NAME:SPLIT, as in tfds:cifar10:train")
    return TFDS(name, split, data_dir)


def tokens(path: str) -> Source:
    """The folder that `sslx tokenize` wrote."""
    return Tokens(path)


def text(glob: str, tokenizer: str | Source | None = None) -> Source:
    """Documents of .txt, .jsonl and .parquet, tokenized as they are read: text(glob, tokenizer),
    or, as in a URI, text("news/*.parquet?tokenizer=DIR"); DIR holds a tokenizer.json."""
    if tokenizer is None:
        glob, _, tokenizer = glob.partition("?tokenizer=")
    if not tokenizer:
        raise DataError(f"text:{glob} needs a tokenizer: text:{glob}?tokenizer=DIR")
    return Text(glob, tokenizer)


def pydocs(split: str = "train", vocabulary_size: int = 8192, length: int = 128) -> Source:
    """Python's own documentation: nine tenths of the documents are "train", the rest, chosen by
    their names, "test"."""
    return PyDocs(split, vocabulary_size, length)


schemes = {
    "digits": digits,
    "parquet": parquet,
    "folder": folder,
    "arrayrecord": arrayrecord,
    "tfds": tfds,
    "tokens": tokens,
    "text": text,
    "pydocs": pydocs,
}


def open_uri(uri: str) -> Source:
    """The source that a URI `SCHEME:WHERE` names, checked. Raises DataError."""
    scheme, colon, where = uri.partition(":")
    if not colon or scheme not in schemes:
        near = difflib.get_close_matches(scheme, schemes, 1)
        hint = f"did you mean {near[0]}:{where}?" if near else f"known: {', '.join(schemes)}"
        raise DataError(f"{uri!r} names no source, which is written SCHEME:WHERE; {hint}")
    source = schemes[scheme](where)
    source.check()
    return source
