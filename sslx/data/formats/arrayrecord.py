"""ArrayRecord files: random access to records of bytes."""

import functools
import io
import os
import resource
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from sslx.data.source import DataError, Record, Source, labelled, matches, needs, within

READERS = 16  # files counted at once, for disks that are far
ALLOWED, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # files that a process may open
OPEN = min(ALLOWED // 2, 4096) if ALLOWED > 0 else 4096


@dataclass(frozen=True)
class ArrayRecord(Source):
    """ArrayRecord files: the fastest shuffled reading, for sets larger than memory.

    A record is an encoded picture (JPEG, PNG, ...), with or without HEADER before it, which
    carries the label: b"sslx", then int64, little endian, -1 for none.
    """

    leaves = ("image",)
    decoder = "Image(size)"
    listed = ("shards",)

    glob: str
    HEADER: ClassVar[struct.Struct] = struct.Struct("<4sq")

    @functools.cached_property
    def shards(self) -> "Shards":
        return Shards(matches("arrayrecord", self.glob))

    @functools.cached_property
    def unlabelled(self) -> str:
        [(first, name)] = self.shards.read([0])
        return "" if first[:4] == b"sslx" else f"{name} is a picture alone, without HEADER"

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
        return {"image": data[self.HEADER.size :], "name": name} | labelled(label, name)


class Shard(NamedTuple):
    """A stretch of an ArrayRecord file, as it was at `time`."""

    path: str
    begin: int
    end: int
    time: int


class Shards:
    """The bytes of ArrayRecord files, or of stretches of them, numbered through.

    Raises DataError if a file is damaged.
    """

    def __init__(self, parts: Sequence[str | Shard]):
        with ThreadPoolExecutor(READERS) as pool:
            self.parts = list(pool.map(counted, parts))
        self.ends = np.cumsum([part.end - part.begin for part in self.parts]).tolist()

    def __len__(self):
        return self.ends[-1]

    def __getitems__(self, indices: list[int]) -> list[bytes]:
        return [data for data, _ in self.read(indices)]

    def read(self, indices: list[int]) -> list[tuple[bytes, str]]:
        """Records and their names. A call to a reader costs 2 us for 1,000 records of its file."""
        rows, records = defaultdict(list), {}
        for k, row in (within(self.ends, index) for index in indices):
            rows[k].append(row)
        for k, wanted in rows.items():
            part = self.parts[k]
            reader = opened(part.path, part.time)
            for row, data in zip(
                wanted, reader.read([part.begin + r for r in wanted]), strict=True
            ):
                records[k, row] = data, f"{part.path}#{part.begin + row}"
        return [records[within(self.ends, index)] for index in indices]


def reader(path: str):
    os.stat(path)  # a lost file is an OSError, which the reader's own is not
    module = needs("array_record.python.array_record_module", "array_record")
    options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 1 << 15}
    return module.ArrayRecordReader(os.fsencode(path), **options)


@functools.lru_cache(maxsize=OPEN)
def opened(path: str, time: int):
    """The reader of a file; those used last stay open. A file that was written anew is another."""
    del time
    return reader(path)


def counted(path: str | Shard) -> Shard:
    """A file with all its records; it is closed again."""
    if isinstance(path, Shard):
        return path
    file, time = reader(path), os.stat(path).st_mtime_ns
    try:
        records = file.num_records()
        file.close()  # which raises what went wrong before
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{path} is not ArrayRecord, or damaged: {error}") from error
    return Shard(path, 0, records, time)


def write_arrayrecord(source: Iterable[Record] | Source, path: str, shards: int = 1) -> list[str]:
    """Copy a source into ArrayRecord files `path-00000-of-00001` ...; returns their names.

    Encoded pictures are copied byte for byte, arrays become PNG. Each record is its own group,
    uncompressed (pictures already are), so any one is read alone. Labels stay the numbers that they
    are; the names of classes are not kept.
    """
    writer = needs("array_record.python.array_record_module", "array_record").ArrayRecordWriter
    paths = [f"{path}-{k:05d}-of-{shards:05d}" for k in range(shards)]
    files = [writer(p, "group_size:1,uncompressed") for p in paths]
    for index in range(len(source)):
        record = source[index]
        image, label = record["image"], record.get("label", -1)
        image = png(image) if isinstance(image, np.ndarray) else image
        header = b"" if source.unlabelled else ArrayRecord.HEADER.pack(b"sslx", label)
        files[index * shards // len(source)].write(header + image)
    for file in files:
        file.close()
    return paths


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(data, "PNG")
    return data.getvalue()
