"""Encoded pictures in Parquet files."""

import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslx.data.source import (
    RESIDENT,
    DataError,
    Source,
    labelled,
    lost,
    matches,
    needs,
    unlabelled_among,
    warned,
    within,
)

READERS = 16  # footers read at once, for disks that are far


@dataclass(frozen=True)
class Parquet(Source):
    """Encoded pictures in Parquet files, as Hugging Face writes them.

    Row groups are read when first touched and kept up to RESIDENT bytes a process. A larger set is
    for passes in order: shuffled, nearly every record costs the reading of its whole row group.
    Labels are column `label`: whole numbers, which a ClassLabel names, or words, which are numbered
    in the order of the alphabet.
    """

    leaves = ("image",)
    decoder = "Image(size)"
    listed = ("files", "footers", "classes")

    glob: str

    @functools.cached_property
    def files(self) -> list[str]:
        return matches("parquet", self.glob)

    @functools.cached_property
    def footers(self) -> tuple[dict[str, Any], list[tuple[str, int]], list[int], list[int]]:
        """What all files have in common, as `columns` says; the row groups (file, number), the end
        of each in records and its size in bytes. Raises DataError where two files differ."""
        places, rows, sizes, common, known = [], [], [], {}, None
        with ThreadPoolExecutor(READERS) as pool:
            footers = pool.map(footer, self.files)
            for path, (schema, groups) in zip(self.files, footers, strict=True):
                if not (known and schema.equals(known, check_metadata=True)):
                    known = schema
                    for name, value in columns(schema, path).items():
                        first, other = common.setdefault(name, (path, value))
                        if other != value:
                            raise DataError(
                                f"{path}: {name}: {value}; but {other} in {first}: write the files "
                                "alike, or make each kind a source of its own"
                            )
                places += [(path, k) for k in range(len(groups))]
                rows += [n for n, _ in groups]
                sizes += [size for _, size in groups]
        common = {name: value for name, (_, value) in common.items()}
        return common, places, np.cumsum(rows).tolist(), sizes

    @property
    def label(self) -> str:
        """What column `label` holds: WHOLE, WORDS, or why that is no label."""
        return self.footers[0].get(LABEL, "it is null in every row")

    @functools.cached_property
    def unlabelled(self) -> str:
        if self.label == ABSENT:
            with opened(self.files[0]) as file:
                return unlabelled_among(file.schema_arrow.names)
        return "" if self.label in (WHOLE, WORDS) else f"column `label`: {self.label}"

    @functools.cached_property
    def classes(self) -> list[str]:
        if self.label != WORDS:
            return list(self.footers[0].get(NAMES, ()))
        words: set[str | None] = set()
        for path in self.files:
            with opened(path) as file:
                for batch in file.iter_batches(columns=["label"]):
                    words |= set(batch["label"].unique().to_pylist())
        return sorted(words - {None})

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each word of column `label`."""
        return {word: k for k, word in enumerate(self.classes)} if self.label == WORDS else {}

    @functools.cached_property
    def read(self):  # the number of a row group -> its pictures and labels
        _, places, _, sizes = self.footers
        keep = max(2, RESIDENT // max(1, max(sizes, default=1)))
        return functools.lru_cache(maxsize=keep)(lambda k: self.load(*places[k]))

    def load(self, path: str, group: int):
        arrow, column = needs("pyarrow.compute", "pyarrow"), self.footers[0][PICTURE]
        names = [column] if self.unlabelled else [column, "label"]
        with opened(path) as file:
            table = file.read_row_group(group, columns=names, use_threads=False)
        pictures = table[column].combine_chunks()
        if pictures.type.num_fields:  # struct<bytes, path>
            pictures = arrow.struct_field(pictures, "bytes")
        return pictures, None if self.unlabelled else self.labels(path, table["label"].to_pylist())

    def labels(self, path: str, values: list) -> list[int | None]:
        """Labels of a row group as numbers; raises DataError for one beyond the named classes."""
        if self.label == WORDS:
            return [self.numbers.get(word) for word in values]
        most = max((value for value in values if value is not None), default=0)
        if self.classes and most >= len(self.classes):
            raise DataError(
                f"{path} has a label {most}, but names {len(self.classes)} classes only, which "
                "count from 0: mend the labels, or the names in its metadata"
            )
        return values

    def check(self):
        super().check()
        _, _, ends, sizes = self.footers
        if sum(sizes) > RESIDENT:
            warned(
                f"{self.glob}: {sum(sizes) / 1e9:.1f} GB do not stay in memory, so a shuffled pass "
                f"reads {ends[-1] / len(ends):.0f} records for each one it uses; convert it once: "
                "sslx.data.formats.arrayrecord.write_arrayrecord(source, path)"
            )

    def __len__(self):
        ends = self.footers[2]
        return ends[-1] if ends else 0

    def __getitem__(self, index):
        _, places, ends, _ = self.footers
        k, row = within(ends, index)
        pictures, labels = self.read(k)
        name = f"{places[k][0]}#{places[k][1]}:{row}"
        label = labels[row] if labels else None
        return {"image": pictures[row].as_py(), "name": name} | labelled(label, name)


# What files must have in common, and what column `label` may hold.
PICTURE, LABEL, NAMES = "the column of pictures", "column `label`", "the classes of `label`"
WHOLE, WORDS, ABSENT = "whole numbers", "words", "absent"


def columns(schema, path: str) -> dict[str, Any]:
    """{PICTURE: name, LABEL: what it holds, NAMES: its classes}; unknown ones are left out."""
    arrow = needs("pyarrow", "pyarrow").types

    def picture(kind):
        if arrow.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return arrow.is_binary(kind) or arrow.is_large_binary(kind)

    pictures = [field.name for field in schema if picture(field.type)]
    named = [name for name in ("image", "img") if name in pictures] or pictures
    if len(named) != 1 and named[:1] != ["image"]:
        held = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(
            f"{path} has no column `image` of encoded bytes or of "
            f"struct<bytes, path>; its columns are {held}"
        )
    for name in (named[0], "label"):
        if (times := schema.names.count(name)) > 1:
            raise DataError(
                f"{path} has {times} columns called `{name}`: rename or drop all but one"
            )
    common = {PICTURE: named[0]}
    if "label" not in schema.names:
        return common | {LABEL: ABSENT}
    kind = schema.field("label").type
    kind = kind.value_type if arrow.is_dictionary(kind) else kind
    if arrow.is_null(kind):
        return common
    if arrow.is_string(kind) or arrow.is_large_string(kind):
        return common | {LABEL: WORDS}
    if not (arrow.is_integer(kind) or arrow.is_boolean(kind)):
        return common | {LABEL: f"{kind}, neither whole numbers nor words: cast it"}
    names = class_names(schema.metadata or {})
    return common | {LABEL: WHOLE} | ({NAMES: names} if names else {})


def class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """The names of a `label` that is a ClassLabel of Hugging Face's datasets; else none."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    right = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if right else []


def footer(path: str) -> tuple[Any, list[tuple[int, int]]]:
    """The schema of a file, and the records and bytes of each row group."""
    with opened(path) as file:
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        return file.schema_arrow, [(g.num_rows, g.total_byte_size) for g in groups]


def opened(path: str):
    """A file, read and not mapped: of a mapped one that is cut short, a read ends the program."""
    arrow = needs("pyarrow", "pyarrow")
    try:
        return needs("pyarrow.parquet", "pyarrow").ParquetFile(arrow.OSFile(os.fsencode(path)))
    except (arrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and lost(error):
            raise
        raise DataError(f"{path} is not Parquet, or damaged: {error}") from error
