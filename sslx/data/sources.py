"""Records by number: `len(source)` and `source[i]`, whatever the files behind them.

A source is a value: it prints, compares, hashes and pickles as its fields, and opens its files on
first use in each process. `open(uri)` is for the command line, the functions are for recipes:

    open("parquet:~/data/train-*.parquet")  ==  parquet("~/data/train-*.parquet")
"""

import abc
import difflib
import functools
import importlib
import io
import logging
import os
import pathlib
import re
import struct
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar
from urllib.parse import parse_qs

import numpy as np

log = logging.getLogger("sslx")
Record = dict[str, Any]

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
RESIDENT = 1 << 30  # bytes of Parquet row groups that a process keeps


class DataError(ValueError):
    """The data, and not the program, is at fault; the message names the file and the fix."""


class Source(abc.ABC):
    """Random access to records {"image", "label", "name"}, or of text {"tokens", "starts", ...}.

    `image` is encoded bytes or uint8 [H, W, C]; `tokens` ids [n], `starts` where each document in
    them begins; `label` an int, absent where none is known; `name` says where the record lies, for
    messages. Handles are cached properties, so they are opened lazily and never compared or
    pickled.
    """

    gives: ClassVar[str] = "image"  # what a decoder must have among its shapes
    resident: ClassVar[bool] = False  # decoded arrays in memory: not worth a worker process

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def records(self, indices: list[int]) -> list[Record]:
        """Many at once, where that is faster than one by one."""
        return [self[index] for index in indices]

    def check(self) -> None:
        """Raise DataError now, before any device work, if there is nothing here to read."""
        if not len(self):
            raise DataError(f"{self} holds no records")

    def suits(self, decode) -> None:
        """Raise DataError if `decode` is for other records than these."""
        if self.gives not in decode.shapes:
            right = {"image": "Image(size)", "tokens": "Window(length, vocabulary)"}[self.gives]
            raise DataError(f"{self} gives {self.gives}, which {decode} cannot read: use {right}")

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, uint8 [8, 8, 1]: nothing to download."""

    split: str = ""
    resident = True

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        digits = needs("sklearn.datasets", "scikit-learn").load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # 0..16 -> 0..255
        cut = len(images) * 4 // 5
        parts = {"": slice(None), "train": slice(cut), "test": slice(cut, None)}
        if self.split not in parts:
            raise DataError(f"digits has no split {self.split!r}: use train, test or none for all")
        return images[parts[self.split]], digits.target[parts[self.split]]

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, index):
        images, labels = self.arrays
        name = f"digits:{self.split}#{index}"
        return {"image": images[index], "label": int(labels[index]), "name": name}


@dataclass(frozen=True)
class Parquet(Source):
    """Encoded pictures in Parquet files, as Hugging Face writes them.

    Row groups are read when first touched and kept up to RESIDENT bytes a process. A larger set is
    for passes in order: shuffled, nearly every record costs the reading of its whole row group.
    """

    glob: str

    @functools.cached_property
    def files(self) -> list[str]:
        return matches("parquet", self.glob)

    @functools.cached_property
    def columns(self) -> tuple[str, bool]:
        """The picture column, and whether there are labels."""
        arrow = needs("pyarrow", "pyarrow")
        try:
            schema = needs("pyarrow.parquet", "pyarrow").read_schema(self.files[0])
        except arrow.ArrowInvalid as error:
            raise DataError(f"{self.files[0]} is not Parquet, or damaged: {error}") from error

        def picture(kind):
            if arrow.types.is_struct(kind):
                return kind.get_field_index("bytes") >= 0
            return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)

        found = [field.name for field in schema if picture(field.type)]
        named = [name for name in ("image", "img") if name in found] or found
        if len(named) != 1 and named[:1] != ["image"]:
            columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
            raise DataError(
                f"{self.files[0]} has no column `image` of encoded bytes or of "
                f"struct<bytes, path>; its columns are {columns}"
            )
        return named[0], "label" in schema.names

    @functools.cached_property
    def groups(self) -> tuple[list[tuple[str, int]], list[int], list[int]]:
        """Row groups (file, number), the end of each in records, and the size of each in bytes."""
        parquet, places, rows, sizes = needs("pyarrow.parquet", "pyarrow"), [], [], []
        for path in self.files:
            footer = parquet.read_metadata(path)
            for group in range(footer.num_row_groups):
                places.append((path, group))
                rows.append(footer.row_group(group).num_rows)
                sizes.append(footer.row_group(group).total_byte_size)
        return places, np.cumsum(rows).tolist(), sizes

    @functools.cached_property
    def read(self):  # the number of a row group -> its pictures and labels
        places, _, sizes = self.groups
        keep = max(2, RESIDENT // max(1, max(sizes, default=1)))
        return functools.lru_cache(maxsize=keep)(lambda k: self.load(*places[k]))

    def load(self, path: str, group: int):
        arrow, parquet = needs("pyarrow.compute", "pyarrow"), needs("pyarrow.parquet", "pyarrow")
        column, labelled = self.columns
        names = [column, "label"] if labelled else [column]
        with parquet.ParquetFile(path, memory_map=True) as file:
            table = file.read_row_group(group, columns=names, use_threads=False)
        pictures = table[column].combine_chunks()
        if pictures.type.num_fields:  # struct<bytes, path>
            pictures = arrow.struct_field(pictures, "bytes")
        return pictures, table["label"].to_pylist() if labelled else None

    def check(self):
        _ = self.columns
        super().check()
        _, ends, sizes = self.groups
        if sum(sizes) > RESIDENT:
            log.warning(
                "%s: %.1f GB do not stay in memory, so a shuffled pass reads %.0f records for each "
                "one it uses; convert it once: sslx.data.sources.write_arrayrecord(source, path)",
                self.glob,
                sum(sizes) / 1e9,
                ends[-1] / len(ends),
            )

    def __len__(self):
        ends = self.groups[1]
        return ends[-1] if ends else 0

    def __getitem__(self, index):
        places, ends, _ = self.groups
        k, row = place(ends, index)
        pictures, labels = self.read(k)
        record = {"image": pictures[row].as_py(), "name": f"{places[k][0]}#{places[k][1]}:{row}"}
        return record if labels is None or labels[row] is None else record | {"label": labels[row]}


@dataclass(frozen=True)
class Folder(Source):
    """Picture files: one folder for each class, in the order of their names, or one flat folder."""

    path: str

    @functools.cached_property
    def classes(self) -> list[str]:
        """The folders that are classes; none if the pictures lie flat."""
        return [] if self.listing[2] is None else [os.path.basename(p) for p in self.listing[0]]

    @functools.cached_property
    def listing(self) -> tuple[list[str], list[list[str]], list[int] | None, list[int]]:
        """Folders, the file names in each, their labels, and the end of each in records."""
        root = os.path.expanduser(self.path)
        if not os.path.isdir(root):
            raise DataError(f"folder: {root!r} is no folder (seen from {os.getcwd()})")
        with os.scandir(root) as entries:
            inner = sorted(e.path for e in entries if e.is_dir() and e.name[0] != ".")
        flat, named = pictures_in(root), [(path, pictures_in(path)) for path in inner]
        named = [(path, names) for path, names in named if names]
        if flat and named:
            raise DataError(
                f"{root} holds both pictures ({flat[0]}) and class folders "
                f"({os.path.basename(named[0][0])}): move the loose pictures away"
            )
        if not flat and not named:
            raise DataError(
                f"{root} holds no pictures and no class folders of {sorted(EXTENSIONS)}"
            )
        folders, names = ([root], [flat]) if flat else map(list, zip(*named, strict=True))
        labels = None if flat else list(range(len(folders)))
        return folders, names, labels, np.cumsum([len(n) for n in names]).tolist()

    def __len__(self):
        return self.listing[3][-1]

    def __getitem__(self, index):
        folders, names, labels, ends = self.listing
        k, row = place(ends, index)
        path = os.path.join(folders[k], names[k][row])
        record = {"image": pathlib.Path(path).read_bytes(), "name": path}
        return record if labels is None else record | {"label": labels[k]}


@dataclass(frozen=True)
class ArrayRecord(Source):
    """ArrayRecord files: the fastest shuffled reading, for sets larger than memory.

    A record is an encoded picture (JPEG, PNG, ...), with or without HEADER before it, which
    carries the label: b"sslx", then int64, little endian, -1 for none.
    """

    glob: str
    HEADER: ClassVar[struct.Struct] = struct.Struct("<4sq")

    @functools.cached_property
    def shards(self) -> "Shards":
        return Shards(matches("arrayrecord", self.glob))

    def __len__(self):
        return self.shards.ends[-1]

    def __getitem__(self, index):
        return self.records([index])[0]

    def records(self, indices):
        return [self.record(data, name) for data, name in self.shards.read(indices)]

    def record(self, data: bytes, name: str) -> Record:
        if data[:4] != b"sslx":
            return {"image": data, "name": name}
        label = self.HEADER.unpack_from(data)[1]
        record = {"image": data[self.HEADER.size :], "name": name}
        return record if label < 0 else record | {"label": label}


@dataclass(frozen=True)
class TFDS(Source):
    """A TensorFlow Datasets set, prepared as array_record; TensorFlow itself is not needed.

    `name` is `NAME[/CONFIG][:VERSION]`, or the folder of one prepared version.
    """

    name: str
    split: str
    data_dir: str | None = None

    @functools.cached_property
    def rows(self):
        tfds = needs("tensorflow_datasets", "tensorflow-datasets")
        path = os.path.expanduser(self.name)
        data_dir = self.data_dir and os.path.expanduser(self.data_dir)
        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            if os.path.isdir(path):
                builder = tfds.builder_from_directory(path)
                return builder.as_data_source(split=self.split, decoders=decoders)
            where = {"data_dir": data_dir, "download": False}
            return tfds.data_source(self.name, split=self.split, decoders=decoders, **where)
        except Exception as error:  # tfds raises many kinds; the first line says which
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise DataError(
                f"{self}: {reason} -- prepare it once where TensorFlow is installed: "
                f"tfds build {self.name} --file_format=array_record"
            ) from error

    def check(self):
        super().check()
        if "image" not in self.rows[0]:
            raise DataError(f"{self} has no feature `image`, only {', '.join(self.rows[0])}")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.records([index])[0]

    def records(self, indices):
        if not all(0 <= index < len(self) for index in indices):
            raise IndexError(f"records {indices} of {len(self)}")
        found = self.rows.__getitems__(indices)
        return [self.record(*pair) for pair in zip(indices, found, strict=True)]

    def record(self, index: int, row: dict[str, Any]) -> Record:
        record = {"image": row["image"], "name": f"tfds:{self.name}:{self.split}#{index}"}
        return record | {"label": int(row["label"])} if "label" in row else record


class Shards:
    """The bytes of ArrayRecord files, numbered through. Raises DataError if one is damaged."""

    def __init__(self, paths: list[str]):
        reader = needs("array_record.python.array_record_data_source", "array_record")
        self.paths, self.readers, lengths = paths, [], []
        for path in paths:
            try:
                self.readers.append(reader.ArrayRecordDataSource([path]))
                lengths.append(len(self.readers[-1]))
            except (RuntimeError, ValueError) as error:
                raise DataError(f"{path} is not ArrayRecord, or damaged: {error}") from error
        self.ends = np.cumsum(lengths).tolist()  # of each file, in records

    def read(self, indices: list[int]) -> list[tuple[bytes, str]]:
        """Records and their names. A call to a reader costs 2 us for 1,000 records of its file."""
        rows, found = defaultdict(list), {}
        for k, row in (place(self.ends, index) for index in indices):
            rows[k].append(row)
        for k, wanted in rows.items():
            for row, data in zip(wanted, self.readers[k].__getitems__(wanted), strict=True):
                found[k, row] = data, f"{self.paths[k]}#{row}"
        return [found[place(self.ends, index)] for index in indices]


def digits(split: str = "") -> Source:
    """scikit-learn's digits: "train" is the first 80 %, "test" the rest, "" both."""
    return Digits(split)


def parquet(glob: str) -> Source:
    """Column `image`, struct<bytes, path> or plain bytes; column `label` where there is one."""
    return Parquet(glob)


def folder(path: str) -> Source:
    """One folder for each class, or one flat folder without labels."""
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
    return text_module().Tokens(path)


def text(glob: str, tokenizer: str | Source | None = None) -> Source:
    """Documents of .txt, .jsonl and .parquet, tokenized as they are read: text(glob, tokenizer),
    or, as in a URI, text("news/*.parquet?tokenizer=DIR"); DIR holds a tokenizer.json."""
    if tokenizer is None:
        glob, _, tokenizer = glob.partition("?tokenizer=")
    if not tokenizer:
        raise DataError(f"text:{glob} needs a tokenizer: text:{glob}?tokenizer=DIR")
    return text_module().Text(glob, tokenizer)


def pydocs(split: str) -> Source:
    """Python's own documentation, "train" or "test"; see text.pydocs."""
    return text_module().pydocs(split)


def text_module():
    return importlib.import_module("sslx.data.text")  # which is built on this one


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


def open(uri: str) -> Source:
    """The source that a URI `SCHEME:WHERE` names, checked. Raises DataError."""
    scheme, colon, where = uri.partition(":")
    if not colon or scheme not in schemes:
        near = difflib.get_close_matches(scheme, schemes, 1)
        hint = f"did you mean {near[0]}:{where}?" if near else f"known: {', '.join(schemes)}"
        raise DataError(f"{uri!r} names no source, which is written SCHEME:WHERE; {hint}")
    source = schemes[scheme](where)
    source.check()
    return source


def write_arrayrecord(source: Iterable[Record] | Source, path: str, shards: int = 1) -> list[str]:
    """Copy a source into ArrayRecord files `path-00000-of-00001` ...; returns their names.

    Encoded pictures are copied byte for byte, arrays become PNG. Each record is its own group,
    uncompressed (pictures already are), so any one is read alone.
    """
    writer = needs("array_record.python.array_record_module", "array_record").ArrayRecordWriter
    paths = [f"{path}-{k:05d}-of-{shards:05d}" for k in range(shards)]
    files = [writer(p, "group_size:1,uncompressed") for p in paths]
    for index in range(len(source)):
        record = source[index]
        image, label = record["image"], record.get("label", -1)
        image = png(image) if isinstance(image, np.ndarray) else image
        files[index * shards // len(source)].write(ArrayRecord.HEADER.pack(b"sslx", label) + image)
    for file in files:
        file.close()
    return paths


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(data, "PNG")
    return data.getvalue()


def place(ends: list[int], index: int) -> tuple[int, int]:
    """A record's number -> which of consecutive parts holds it, and its number there."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"record {index} of {ends[-1]}")
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def pictures_in(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(
            e.name
            for e in entries
            if os.path.splitext(e.name)[1].lower() in EXTENSIONS and e.name[0] != "."
        )


def matches(scheme: str, pattern: str) -> list[str]:
    import glob

    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if any(os.path.isdir(path) for path in paths):
        raise DataError(f"{scheme}:{pattern} is a folder: name its files, {scheme}:{pattern}/*")
    if not paths:
        raise DataError(f"{scheme}:{pattern} matches no file (seen from {os.getcwd()})")
    return paths


def needs(module: str, package: str):
    """Import on first use: a worker starts fast, and a missing package says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"this source needs {package}: pip install {package}") from error
