"""Windows of tokens that `sslx tokenize` wrote, for training."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data.formats.arrayrecord import Shard, Shards
from sslx.data.source import DataError, Source
from sslx.data.text.folder import read_json
from sslx.data.text.tokenizers import tokenizer_digest, tokenizer_file, warn_of_unknown
from sslx.data.text.windows import Window, same_vocabulary, width
from sslx.vocabulary import Vocabulary

AGAIN = "run the same `sslx tokenize` again, which writes it anew"
KINDS = {"length": int, "tokenizer": str, "vocabulary": dict, "counts": dict, "shards": list}
IDS = dict.fromkeys((field.name for field in fields(Vocabulary)), int)
COUNTED = {"tokens": int, "unknown": int}
SHARD = {"name": str, "bytes": int, "windows": int}


@dataclass(frozen=True)
class Tokens(Source):
    """Windows that `sslx tokenize` wrote: {"tokens", "starts", "name"}, checked by its manifest."""

    path: str
    leaves = ("tokens", "starts")
    decoder = "Window(length, vocabulary)"
    resident = True  # a window is decoded in microseconds: no worker repays its start

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        file = Path(self.folder) / "manifest.json"
        if file.exists():
            return checked(file)
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
        return Vocabulary(**{name: self.manifest["vocabulary"][name] for name in IDS})

    @property
    def window(self) -> Window:
        """How to decode these records: Pipeline(source, source.window)."""
        return Window(self.length, self.vocabulary)

    @functools.cached_property
    def shards(self) -> Shards:
        """Opened when they are read, and only so many at a time."""
        time = os.stat(os.path.join(self.folder, "manifest.json")).st_mtime_ns
        return Shards(
            [
                Shard(os.path.join(self.folder, row["name"]), 0, row["windows"], time)
                for row in self.manifest["shards"]
            ]
        )

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
        counts = self.manifest["counts"]
        warn_of_unknown(self.folder, counts["unknown"], counts["tokens"])

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
        kind, records = width(self.vocabulary), []
        for data, name in self.shards.read(indices):
            codes = np.frombuffer(data, kind)
            n = 1 + int(codes[0])
            records.append({"tokens": codes[n:], "starts": codes[1:n], "name": name})
        return records


def checked(file: Path) -> dict[str, Any]:
    """A manifest. Raises DataError where a field is missing or of another type."""

    def check(where: str, row: Any, kinds: Mapping[str, type]) -> None:
        for name, kind in kinds.items():
            value = row.get(name) if isinstance(row, dict) else row
            if not isinstance(value, kind) or isinstance(value, bool):
                raise DataError(
                    f"{file} has {where}{name}={value!r:.60} where {kind.__name__} is expected: "
                    f"{AGAIN}"
                )

    manifest = read_json(file, AGAIN)
    check("", manifest, KINDS)
    check("vocabulary.", manifest["vocabulary"], IDS)
    check("counts.", manifest["counts"], COUNTED)
    for i, row in enumerate(manifest["shards"]):
        check(f"shards[{i}].", row, SHARD)
    return manifest
