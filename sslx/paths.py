"""Where a run is: a directory of this machine, or one in a bucket, gs:// or s3://.

Orbax reads and writes its own files by etils' epath. Ours go by fsspec without it, because epath
keeps listings of buckets, which other processes change, and its errors are those of several
libraries and no OSErrors.
"""

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # schemes, and what fsspec needs for them
DRIVERS = {"gs": "gcs", "s3": "s3"}  # of tensorstore


@dataclass(frozen=True, order=True)
class Remote:
    """A path in a bucket, with the methods of pathlib.Path that runs need.

    What fails is an OSError that names the path. Directories are there once something is in them.
    """

    scheme: str
    parts: tuple[str, ...]  # the bucket, and what follows

    def __str__(self) -> str:
        return f"{self.scheme}://{'/'.join(self.parts)}"

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.scheme, (*self.parts, *filter(None, str(name).split("/"))))

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def parent(self) -> "Remote":
        return Remote(self.scheme, self.parts[:-1])

    def with_name(self, name: str) -> "Remote":
        return self.parent / name

    @property
    def store(self) -> dict:
        """The tensorstore spec of what is under this path."""
        bucket, *keys = self.parts
        path = "/".join([*keys, ""]) if keys else ""
        spec = {"driver": DRIVERS[self.scheme], "bucket": bucket, "path": path}
        if self.scheme == "s3":  # tensorstore reads neither variable for it, botocore both
            names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
            if endpoint := next(filter(None, map(os.environ.get, names)), None):
                spec["endpoint"] = endpoint
            if "AWS_ACCESS_KEY_ID" in os.environ:  # comes first anyway, and files are not missed
                spec["aws_credentials"] = {"type": "environment"}
        return spec

    @contextlib.contextmanager
    def _files(self) -> Iterator:
        """fsspec's file system, in a context in which all that fails is an OSError."""
        try:
            yield _file_system(self.scheme)
        except Exception as error:
            kinds = (FileNotFoundError, FileExistsError, PermissionError)
            kind = next((k for k in kinds if isinstance(error, k)), OSError)
            raise kind(f"{self}: {' '.join(str(error).split()) or type(error).__name__}") from error

    def absolute(self) -> "Remote":
        return self

    def _kind(self) -> str:
        """ "file", "directory", or nothing. (fsspec's own `isfile` takes a store that is out of
        reach for one without the file.)"""
        with self._files() as files:
            try:
                return files.info(str(self))["type"]
            except FileNotFoundError:
                return ""

    def exists(self) -> bool:
        return bool(self._kind())

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def iterdir(self) -> list["Remote"]:
        """What is in the directory; empty where it is not there."""
        with self._files() as files:
            try:
                paths = files.ls(str(self), detail=False)
            except FileNotFoundError:
                return []
        names = [path.rstrip("/").rpartition("/")[2] for path in paths]
        return [self / name for name in sorted(set(names) - {self.name})]

    def read_bytes(self) -> bytes:
        with self._files() as files:
            return files.cat_file(str(self))

    def read_text(self, errors: str = "strict") -> str:
        return self.read_bytes().decode(errors=errors)

    def write_bytes(self, data: bytes) -> None:
        """Replace the object by another: whoever reads sees the one or the other."""
        with self._files() as files:
            files.pipe_file(str(self), data)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: fsspec would make the bucket, if its name was mistyped."""

    def replace(self, target: "Remote") -> None:
        target.write_bytes(self.read_bytes())
        self.unlink()

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok), self._files() as files:
            files.rm_file(str(self))

    def rmtree(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok), self._files() as files:
            files.rm(str(self), recursive=True)


Place = Path | Remote


def place(text: str | os.PathLike | Remote) -> Place:
    """The path that a text names; raises ValueError for one that nothing here reads."""
    if isinstance(text, Remote):
        return text
    text = os.fspath(text)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)", text)
    if not match:
        return Path(text).expanduser()
    scheme, rest = match[1], text[match.end() :]
    if scheme not in PACKAGES:
        raise ValueError(
            f"{text}: a run is in a directory of this machine, or on "
            f"{' or '.join(f'{s}://' for s in PACKAGES)}."
        )
    parts = tuple(filter(None, rest.split("/")))
    if not match[2]:
        raise ValueError(
            f"{text} would be a folder of this machine that is named {scheme}: (pathlib.Path joins "
            f"slashes): write {scheme}://{'/'.join(parts)}, and give it as text."
        )
    if not parts or {".", ".."} & set(parts):
        raise ValueError(f"{text} is no path in a bucket: write {scheme}://BUCKET/RUN.")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise ValueError(f"{scheme}:// is read by {PACKAGES[scheme]}: pip install 'sslx[{scheme}]'")
    off = os.environ.get("EPATH_USE_TF", "").lower() in ("false", "no", "f", "0")
    if not off and importlib.util.find_spec("tensorflow"):
        raise ValueError(
            f"TensorFlow is installed, by which orbax would read {scheme}://, slowly or not at "
            "all: set EPATH_USE_TF=0 in the environment."
        )
    return Remote(scheme, parts)


@functools.cache
def _file_system(scheme: str):
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False)
