"""Picture files in folders."""

import functools
import os
import pathlib
from dataclasses import dataclass

import numpy as np

from sslx.data.source import DataError, Source, place

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Folder(Source):
    """Picture files: one folder for each class, in the order of their names, or one flat folder."""

    leaves = ("image",)
    decoder = "Image(size)"

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


def pictures_in(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(
            e.name
            for e in entries
            if os.path.splitext(e.name)[1].lower() in EXTENSIONS and e.name[0] != "."
        )
