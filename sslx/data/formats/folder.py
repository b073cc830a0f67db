"""Picture files in folders."""

import functools
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from sslx.data.source import DataError, Source, labelled, warned, within

EXTENSIONS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"),
}

SPLITS = {"train", "training", "test", "val", "valid", "validation", "dev"}


@dataclass(frozen=True)
class Folder(Source):
    """Picture files: one folder for each class, in the order of their names, or one flat folder.

    A class has the pictures of its folder and of all folders below. Links are followed, names that
    begin with a dot are left out, and what else is passed over is counted in a warning.
    """

    leaves = ("image",)
    decoder = "Image(size)"
    listed = ("tree",)

    path: str

    @property
    def classes(self) -> list[str]:
        """The folders that are classes, also empty ones; none if the pictures lie flat."""
        return [] if self.flat else [os.path.basename(name) for name, _ in self.tree[1]]

    @property
    def unlabelled(self) -> str:
        return "its pictures lie in no class folders" if self.flat else ""

    @property
    def flat(self) -> bool:
        return bool(self.tree[0].pictures)

    @functools.cached_property
    def tree(self) -> tuple["Leaf", list[tuple[str, list["Leaf"]]]]:
        """What lies in the folder itself, and its class folders with all that lies in each."""
        root = os.path.expanduser(self.path)
        if not os.path.isdir(root):
            raise DataError(f"folder: {root!r} is no folder (seen from {os.getcwd()})")
        top = leaf(root)
        classes = [(path, list(below(path, top))) for path in top.folders]
        inside = [x for _, leaves in classes for x in leaves if x.pictures]
        if top.pictures and inside:
            raise DataError(
                f"{root} holds both pictures ({top.pictures[0]}) and class folders "
                f"({os.path.relpath(inside[0].path, root)}): move the loose pictures away"
            )
        if not top.pictures and not inside:
            other = passed(top, classes)
            raise DataError(
                f"{root} holds no pictures and no class folders of {sorted(EXTENSIONS)}"
                f"{other and f', only {other}'}"
            )
        deep = not any(leaves[0].pictures for _, leaves in classes)
        if inside and deep and not one_below(classes):
            deep = os.path.dirname(inside[0].path)
            raise DataError(
                f"{root} holds no class folders: pictures lie deeper, in {inside[0].path}; "
                f"name the folder whose folders are the classes, such as folder:{deep}"
            )
        return top, classes

    @functools.cached_property
    def listing(self) -> tuple[list["Leaf"], list[int], list[int]]:
        """Folders with pictures, the label of each, and the end of each in records."""
        top, classes = self.tree
        pairs = [(x, k) for k, (_, leaves) in enumerate(classes) for x in leaves if x.pictures]
        leaves, labels = zip(*([(top, -1)] if self.flat else pairs), strict=True)
        return list(leaves), list(labels), np.cumsum([len(x.pictures) for x in leaves]).tolist()

    def check(self):
        super().check()
        top, classes = self.tree
        if other := passed(top, classes):
            warned(f"folder:{self.path}: passed over {other}, which are no pictures by their names")
        if deep := [x for _, leaves in classes for x in leaves[1:] if x.pictures]:
            count = sum(len(x.pictures) for x in deep)
            warned(
                f"folder:{self.path}: {count} pictures lie in folders below class folders, such as "
                f"{os.path.relpath(deep[0].path, top.path)}, and are of the class above them"
            )
        full = set(self.listing[1])
        empty = [name for k, name in enumerate(self.classes) if k not in full]
        if empty:
            few = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            warned(
                f"folder:{self.path}: no pictures in {few}, counted among its classes all the same"
            )

    def __len__(self):
        return self.listing[2][-1]

    def __getitem__(self, index):
        leaves, labels, ends = self.listing
        k, row = within(ends, index)
        path = os.path.join(leaves[k].path, leaves[k].pictures[row])
        return {"image": content(path), "name": path} | labelled(labels[k], path)


@dataclass
class Leaf:
    """One folder: names of its pictures, paths of its folders, kinds of what else is there."""

    path: str
    identity: tuple[int, int] = (0, 0)  # of a folder by whatever path
    pictures: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)


def leaf(path: str) -> Leaf:
    """What a folder holds. A file is opened for none, and looked up for links to folders alone."""
    try:
        status = os.stat(path)
        held = Leaf(path, (status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                suffix, link = os.path.splitext(entry.name)[1].lower(), entry.is_symlink()
                picture = suffix in EXTENSIONS
                folder = entry.is_dir(follow_symlinks=False)
                if folder or (link and not picture and os.path.isdir(entry.path)):
                    held.folders.append(entry.path)
                elif not link and not entry.is_file():
                    held.others["pipe or device"] += 1
                elif picture:
                    held.pictures.append(entry.name)
                else:
                    held.others[suffix or "no suffix"] += 1
    except OSError as error:
        raise DataError(f"{path} cannot be listed: {error}") from error
    held.pictures.sort()
    held.folders.sort()
    return held


def below(path: str, top: Leaf) -> Iterator[Leaf]:
    """A class folder and all folders below, by their names; a link to one above it is none."""
    waiting = [(path, (top.identity,))]
    while waiting:
        path, above = waiting.pop()
        held = leaf(path)
        if held.identity not in above:
            yield held
            above = (*above, held.identity)
            waiting += [(inner, above) for inner in reversed(held.folders)]


def one_below(classes: list[tuple[str, list[Leaf]]]) -> bool:
    """Whether each class has its pictures in one folder, called the same in all, as Tiny ImageNet
    has CLASS/images; folders that are called as splits are no classes."""
    where = [
        [os.path.relpath(x.path, path) for x in leaves if x.pictures] for path, leaves in classes
    ]
    splits = SPLITS & {os.path.basename(path).lower() for path, _ in classes}
    alike = all(found == where[0] for found in where)
    return (
        len(classes) > 1 and not splits and alike and len(where[0]) == 1 and "/" not in where[0][0]
    )


def passed(top: Leaf, classes: list[tuple[str, list[Leaf]]]) -> str:
    """How many files of which kinds are no pictures, in words."""
    others = sum((x.others for _, leaves in classes for x in leaves), top.others)
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
    files = f"{others.total()} file{'s' * (others.total() > 1)}"
    return f"{files} ({kinds})" if others else ""


def content(path: str) -> bytes:
    """The bytes of a file; raises ValueError for what can have none, and waits for no pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise ValueError(f"{path} is a broken link") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no file, but a folder, a pipe or a device")
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
