"""TensorFlow Datasets, read without TensorFlow."""

import functools
import os
from dataclasses import dataclass
from typing import Any

from sslx.data.formats.arrayrecord import Shard, Shards
from sslx.data.source import DataError, Record, Source, labelled, needs, unlabelled_among


@dataclass(frozen=True)
class TFDS(Source):
    """A TensorFlow Datasets set, prepared as array_record; TensorFlow itself is not needed.

    `name` is `NAME[/CONFIG][:VERSION]`, or the folder of one prepared version.
    """

    leaves = ("image",)
    decoder = "Image(size)"

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
                rows = builder.as_data_source(split=self.split, decoders=decoders)
            else:
                where = {"data_dir": data_dir, "download": False}
                rows = tfds.data_source(self.name, split=self.split, decoders=decoders, **where)
            info = rows.dataset_info
            if info.file_format.value == "array_record":  # whose own source closes no file again
                parts = info.splits[self.split].file_instructions
                rows.data_source = Shards(
                    [Shard(os.fspath(p.filename), p.skip, p.skip + p.take, 0) for p in parts]
                )
            return rows
        except Exception as error:  # tfds raises many kinds; the first line says which
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise DataError(
                f"{self}: {reason} -- prepare it once where TensorFlow is installed: "
                f"tfds build {self.name} --file_format=array_record"
            ) from error

    @property
    def features(self):
        return self.rows.dataset_info.features

    @property
    def classes(self) -> list[str]:
        named = "label" in self.features and hasattr(self.features["label"], "names")
        return list(self.features["label"].names) if named else []

    @property
    def unlabelled(self) -> str:
        return "" if "label" in self.features else unlabelled_among(self.features)

    def check(self):
        super().check()
        if "image" not in self.features:
            raise DataError(f"{self} has no feature `image`, only {', '.join(self.features)}")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.records([index])[0]

    def records(self, indices):
        if not all(0 <= index < len(self) for index in indices):
            raise IndexError(f"records {indices} of {len(self)}")
        rows = self.rows.__getitems__(indices)
        return [self.record(*pair) for pair in zip(indices, rows, strict=True)]

    def record(self, index: int, row: dict[str, Any]) -> Record:
        record = {"image": row["image"], "name": f"tfds:{self.name}:{self.split}#{index}"}
        return record | labelled(row.get("label"), record["name"])
