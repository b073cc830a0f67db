"""Encoded pictures in Parquet files."""

import functools
import logging
from dataclasses import dataclass

import numpy as np

from sslx.data.source import RESIDENT, DataError, Source, matches, needs, place

log = logging.getLogger("sslx")


@dataclass(frozen=True)
class Parquet(Source):
    """Encoded pictures in Parquet files, as Hugging Face writes them.

    Row groups are read when first touched and kept up to RESIDENT bytes a process. A larger set is
    for passes in order: shuffled, nearly every record costs the reading of its whole row group.
    """

    leaves = ("image",)
    decoder = "Image(size)"

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

        pictures = [field.name for field in schema if picture(field.type)]
        named = [name for name in ("image", "img") if name in pictures] or pictures
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
