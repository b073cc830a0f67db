"""Save, verify, restore: the one file that imports orbax.

A checkpoint is a directory named after its step. Orbax writes the arrays, under the paths of the
state (`params/encoder/kernel`), and commits them by a rename; a record of each array's dtype,
shape and digest is committed with them. Orbax loads a flipped bit without a word (24 of 24
tried), so what is restored is digested again: the newest checkpoint that verifies is used.

In a bucket, where a directory cannot be renamed, the object commit_success.txt commits. Orbax
writes arrays to gs:// and not to s3:// (google/orbax#2739), so the arrays there are written here.
"""

import asyncio
import errno
import functools
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental.array_serialization import serialization

from sslx.digest import Leaf, data, digest, is_key, named
from sslx.paths import Place, Remote, place
from sslx.processes import Attempts, agreed, by_first, of_first
from sslx.types import Array, Tree

log = logging.getLogger("sslx")

ATTEMPT = re.compile(r"(0|[1-9][0-9]*)(\.orbax-checkpoint-tmp.*)?")  # renamed when whole
READING = 600.0  # seconds that hosts wait until process 0 has seen what was written
RETRIES = 8  # of a request to a bucket: about two minutes
PATIENCE = 60  # seconds that a host waits to see a checkpoint that process 0 sees


class CheckpointError(RuntimeError):
    """No checkpoint can be restored: none exists, none verifies, or it is of another state."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest `last`, and every step that `every` divides."""

    last: int = 3
    every: int | None = None

    def __post_init__(self):
        if self.last < 1 or (self.every is not None and self.every < 1):
            raise ValueError(f"{self} keeps no checkpoint: last and every count from 1")

    def stale(self, steps: list[int]) -> list[int]:
        """The steps to delete among `steps`, oldest first."""
        return [s for s in steps[: -self.last] if not self.every or s % self.every]


# ---- states as flat dicts ----


def _kind(x: Leaf) -> str:
    """The dtype and shape of a leaf as text, such as `float32[3,4]` or `key<fry>[]`."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _like(abstract: Leaf, x: Array) -> Array:
    """A restored array as a typed key again, where the abstract leaf is one."""
    if not is_key(abstract):
        return x
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(jnp.empty((), abstract.dtype)))


def _target(x: Leaf) -> ocp.RestoreArgs:
    """How orbax restores a leaf: with its sharding, else on the first local device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shape = jax.eval_shape(data, x).shape
    return ocp.ArrayRestoreArgs(sharding=getattr(x, "sharding", None) or first, global_shape=shape)


def _difference(disk: dict[str, str], here: dict[str, str]) -> list[str]:
    """One line for each array that is not the same on disk and in the state."""

    def alone(path, where, others, there):
        near = get_close_matches(path, others, 1, 0.8)
        return f"{path} is only {where}" + (f" ({there}: {near[0]})" if near else "")

    gone, new = disk.keys() - here.keys(), here.keys() - disk.keys()
    lines = [alone(path, "on disk", new, "here") for path in sorted(gone)]
    lines += [alone(path, "here", gone, "on disk") for path in sorted(new)]
    both = sorted(path for path in disk.keys() & here.keys() if disk[path] != here[path])
    return lines + [f"{path} is {disk[path]} on disk, {here[path]} here" for path in both]


# ---- on disk ----


def _seal(arrays: dict[str, list]) -> dict:
    """The record of the arrays with a checksum, so that its damage is told from another state."""
    return {"arrays": arrays, "crc32": zlib.crc32(json.dumps(arrays, sort_keys=True).encode())}


def _record(path: epath.Path | Remote) -> dict[str, list]:
    """{path: [kind, digest]} as saved; raises if the record is missing or damaged."""
    record = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    if record != _seal(record["arrays"]):
        raise ValueError("the record of the arrays is damaged")
    return record["arrays"]


def _finished(path: epath.Path | Remote) -> bool:
    """Whether it was committed, even if it was damaged later: either of two markers is enough on a
    disk, where a directory has its name once it is whole."""
    try:
        marked = (path / "commit_success.txt").exists()
        committed = marked or (not isinstance(path, Remote) and bool(_record(path)))
    except Exception:
        committed = False
    return committed and path.name.isdecimal()


def _size(arrays: dict[str, Array]) -> int:
    """The bytes of a checkpoint, with ample room for what orbax writes about each array."""
    return sum(x.nbytes for x in arrays.values()) + 4096 * (len(arrays) + 16)


class Buckets(ocp.type_handlers.TypeHandler):
    """Arrays in s3://, each a directory of the shards that processes write, as zarr."""

    _array_metadata_store = None  # orbax asks for one

    def __init__(self):
        self.context = tensorstore.Context({"s3_request_retries": {"max_retries": RETRIES}})

    def typestr(self) -> str:
        return "jax.Array"

    async def metadata(self, infos: Sequence) -> list:
        stores = await asyncio.gather(*(self.open(info) for info in infos))
        return [
            ocp.metadata.ArrayMetadata(
                name=info.name,
                directory=info.parent_dir,
                shape=store.shape,
                dtype=store.dtype.numpy_dtype,
                sharding=None,
            )
            for info, store in zip(infos, stores, strict=True)
        ]

    async def serialize(self, values: Sequence, infos: Sequence, args=None) -> list:
        """Futures, returned once the arrays are off the device."""
        commits: list = []
        writes = [
            serialization.async_serialize(
                x, self.spec(info), commit_future=commits, context=self.context, primary_host=0
            )
            for x, info in zip(values, infos, strict=True)
        ]
        await asyncio.gather(*writes)
        return commits

    async def deserialize(self, infos: Sequence, args: Sequence) -> list:
        async def read(info, to):
            if isinstance(to, ocp.ArrayRestoreArgs):
                return await serialization.async_deserialize(
                    to.sharding, self.spec(info), to.global_shape, context=self.context
                )
            return np.asarray(await (await self.open(info)).read())

        return await asyncio.gather(*map(read, infos, args))

    def open(self, info):
        return tensorstore.open(self.spec(info), open=True, context=self.context)

    @staticmethod
    def spec(info) -> dict:
        """How tensorstore opens an array; a lost shard is missed, and not read as zeros."""
        return {
            "driver": "zarr3",
            "kvstore": place(str(info.path)).store,
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        }


def _handler(directory: epath.Path | Remote) -> ocp.PyTreeCheckpointHandler:
    """How orbax writes to a directory."""
    # Compression saves 8 % of float32 weights and takes seven times as long.
    options = {"use_zarr3": True, "use_compression": False}
    if isinstance(directory, Remote) and directory.scheme == "s3":
        arrays = Buckets()
        kinds = [(jax.Array, arrays), (np.ndarray, arrays)]
        registry = ocp.type_handlers.create_type_handler_registry(*kinds)
        options |= {"use_ocdbt": False, "type_handler_registry": registry}
        handler = ocp.PyTreeCheckpointHandler(**options)
        handler.finalize = lambda directory: None  # it would warn that it has nothing to merge
        return handler
    return ocp.PyTreeCheckpointHandler(type_handler_registry=_handlers(), **options)


def _handlers():
    """How orbax writes arrays: those that several devices hold whole are written by all of them, a
    part each, if the parts are a mebibyte or more: it would cut a bias into one for each device."""
    kinds = ocp.type_handlers
    arrays = kinds.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    return kinds.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, kinds.NumpyHandler())
    )


def _reason(error: BaseException) -> str:
    """The first cause of an error in one line, without tensorstore's details."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).partition("[tensorstore_spec=")[0].partition("\n")[0]
    text = text if len(text) < 400 else f"{text[:150]} ... {text[-250:]}"
    return f"{type(error).__name__}: {text.strip()}"


def _say(level: int, message: str, *args) -> None:
    if jax.process_index() == 0:
        log.log(level, message, *args)


def check_path(directory: Place) -> None:
    """Raise ValueError for a path under which orbax would write what nothing can read again."""
    path = str(directory.absolute())
    if odd := [c for c in path if c in "[*?\\" or "\ud800" <= c <= "\udfff"]:
        raise ValueError(
            f"{path!r} has {odd[0]!r} in it, which orbax, the writer of checkpoints, takes for "
            "something else: name another directory, or a link to this one."
        )


class Checkpoints:
    """The checkpoints of one run, in one directory; all processes call every method together.

    What this object saved and removed it knows itself: the listing of a shared disk or an object
    store may lag behind.
    """

    def __init__(self, directory: epath.PathLike | Remote, keep: Retention = Retention()):
        directory = place(directory)
        self._remote = isinstance(directory, Remote)
        self.directory = directory if self._remote else epath.Path(directory).absolute()
        self.keep = keep
        self._handler = _handler(self.directory)
        self._together = Attempts()
        self._orbax = self._writer()
        self._worker = ThreadPoolExecutor(1, "sslx-checkpoint")
        self._pending: Future | None = None
        self._current: int | None = None  # the step last saved or restored
        self._bad: set[int] = set()  # steps that this process saw fail
        self._saved: set[int] = set()
        self._removed: set[int] = set()

    def _writer(self) -> ocp.AsyncCheckpointer:
        """An orbax writer that makes directories in the foreground, where failures are seen."""
        options = ocp.AsyncOptions(
            create_directories_asynchronously=False, barrier_sync_fn=self._meet
        )
        commit = {"temporary_path_class": ocp.path.atomicity.CommitFileTemporaryPath}
        commit = commit if self._remote else {}
        return ocp.AsyncCheckpointer(self._handler, async_options=options, **commit)

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier, which fails where another process could not write: orbax's own would
        wait for that process."""
        self._together.meet(key, timeout_ms / 1000)

    def steps(self) -> list[int]:
        """The steps of all finished checkpoints, oldest first, verified or not."""
        listed = {int(path.name) for path in self._attempts() if _finished(path)}
        return sorted(listed - self._removed | self._saved)

    def good(self) -> list[int]:
        """Those of them that this process has not seen fail."""
        return [step for step in self.steps() if step not in self._bad]

    def _attempts(self) -> list[epath.Path | Remote]:
        """The paths of all checkpoints, also unfinished ones; other entries are the user's."""
        entries = self.directory.iterdir() if self.directory.exists() else []
        return [path for path in entries if ATTEMPT.fullmatch(path.name) and path.is_dir()]

    # ---- saving ----

    def save(self, step: int, state: Tree) -> None:
        """Return once the arrays are off the device; writing and tidying go on in the background.

        A full disk never stops the run: the loss is logged and the next save tries again. The
        step saved or restored last is not written twice; any other of that number (it did not
        verify, or an older run left it) is overwritten.
        """
        self.wait()
        if step == self._current:
            return
        self._saved.discard(step)
        self._together.begin()
        with jax.transfer_guard("allow"):  # the copy off the device is what this is for
            arrays, digests = named(state), digest(state)
            record = _seal({path: [_kind(x), digests[path]] for path, x in arrays.items()})
            arrays = {path: data(x) for path, x in arrays.items()}
            try:
                by_first(functools.partial(self._prepare, step, _size(arrays)))
                target = epath.Path(str(self.directory / str(step)))
                tree = ocp.args.PyTreeSave(arrays)
                self._orbax.save(target, args=tree, custom_metadata=record, force=True)
            except Exception as error:
                self._together.fail(_reason(error))
                if not (self._remote or isinstance(error, OSError)):
                    raise  # each store has errors of its own
                return self._lost(step, error)
        self._pending = self._worker.submit(self._finish, step, record)

    def _prepare(self, step: int, size: int) -> None:
        """Remove half-written attempts, and what is overwritten in a bucket. Raise OSError where a
        disk has no room for `size` bytes: orbax would log a traceback for every array."""
        self._sweep()
        if self._remote:
            return self._remove(self.directory / str(step))
        folder = next(p for p in (self.directory, *self.directory.parents) if p.exists())
        total, _, free = shutil.disk_usage(folder)
        if total and free < size:  # some disks say nothing: 0 of 0
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}, {size / 2**20:.1f} MiB are needed and "
                f"{free / 2**20:.1f} MiB free",
                str(self.directory),
            )

    def _finish(self, step: int, record: dict) -> None:
        try:
            self._orbax.wait_until_finished()
            self._see(step, record)
            self._together.meet("seen", READING)
        except Exception as error:
            self._together.fail(_reason(error))
            return self._lost(step, error)
        self._current = step
        self._saved.add(step)
        self._removed.discard(step)
        self._bad.discard(step)
        # Checkpoints of later steps, of a run that went back, are neither counted nor removed.
        try:
            for old in self.keep.stale([s for s in self.good() if s <= step]):
                self._remove(self.directory / str(old))
        except OSError as error:
            _say(logging.WARNING, "old checkpoints stay (%s)", _reason(error))

    def _see(self, step: int, record: dict) -> None:
        """Raise where what was just written cannot be opened: its record and each of its arrays."""
        if jax.process_index() == 0:
            path = self.directory / str(step)
            self._bad.add(step)
            if _record(path) != record["arrays"]:
                raise ValueError("the record of the arrays is not what was written")
            self._handler.metadata(epath.Path(str(path)))

    def _lost(self, step: int, error: Exception) -> None:
        self._orbax = self._writer()  # the old one would raise it again
        try:
            self._sweep()
            good = self.good()
            rest = f"the newest good one is step {good[-1]}" if good else "there is no other"
        except OSError as gone:
            rest = f"the others cannot be read ({_reason(gone)})"
        message = "checkpoint of step %d is lost (%s); %s; the run goes on"
        _say(logging.ERROR, message, step, _reason(error), rest)

    def _sweep(self) -> None:
        """Remove half-written attempts; called while none of this run is under way."""
        for path in self._attempts():
            if not _finished(path) and path.name not in map(str, self._saved):
                self._remove(path)

    def _remove(self, path: epath.Path | Remote) -> None:
        try:
            if jax.process_index() == 0:
                if self._remote:  # object by object; a rest must not count
                    (path / "commit_success.txt").unlink(missing_ok=True)
                path.rmtree(missing_ok=True)
        except OSError as error:
            return _say(logging.WARNING, "%s could not be deleted (%s)", path, _reason(error))
        if path.name.isdecimal():
            self._saved.discard(int(path.name))
            self._removed.add(int(path.name))

    def wait(self) -> None:
        """Wait until the last save is on disk, or its loss has been logged."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait for the last save and end the threads; else a save in progress is lost at exit."""
        self.wait()
        self._worker.shutdown()
        self._orbax.close()

    # ---- restoring ----

    def restore(
        self, abstract: Tree, step: int | None = None, before: int | None = None
    ) -> tuple[int, Tree] | None:
        """The newest state that verifies, sharded as `abstract` says; None if none was ever saved.

        `abstract` is ShapeDtypeStructs with shardings, on any mesh. With `step`, that one only;
        with `before`, only those of steps before it.
        Raises CheckpointError if there are checkpoints and none verifies (starting from scratch
        would be silent loss), or if one belongs to another state.
        """
        self.wait()
        with jax.transfer_guard("allow"):
            newest = self._walk(named(abstract), step, before)
            if newest is None:
                return None
            self._current, arrays = newest
            leaves, treedef = jax.tree.flatten(abstract)
            return self._current, treedef.unflatten(map(_like, leaves, arrays.values()))

    def _walk(
        self, want: dict | None, step: int | None, before: int | None = None
    ) -> tuple[int, dict] | None:
        """(step, arrays) of the newest checkpoint that verifies; says which did not, and why."""
        for path in self._attempts():
            if not _finished(path):
                _say(logging.WARNING, "checkpoint skipped: %s is not finished", path)
        skipped = []
        for candidate in self._candidates(step, before, want is not None):
            arrays, reason = self._read(candidate, want)
            if reason is None:
                return candidate, arrays
            skipped.append(f"step {candidate}: {reason}")
            self._bad.add(candidate)
            _say(logging.WARNING, "checkpoint skipped: %s", skipped[-1])
        if skipped:
            text = f"no checkpoint in {self.directory} verifies:\n  "
            raise CheckpointError(text + "\n  ".join(skipped))
        return None

    def _candidates(self, step: int | None, before: int | None, together: bool) -> list[int]:
        """The steps to try, newest first: where all restore together, those that process 0 sees."""
        steps = self.steps()
        chosen = [s for s in steps if step in (None, s) and (before is None or s < before)]
        if together:
            padded = of_first(np.asarray(([-1] * 1024 + chosen)[-1024:], np.int32))
            chosen = [int(s) for s in padded if s >= 0]
        if step is not None and not chosen:
            raise CheckpointError(
                f"{self.directory} has no checkpoint of step {step}, only of {steps}."
            )
        return chosen[::-1]

    def _await(self, path: epath.Path | Remote) -> None:
        """Wait until this host sees a checkpoint that process 0 sees; a shared disk may be late."""
        end = time.monotonic() + PATIENCE
        if not _finished(path):
            log.warning("waiting up to %d s until this host sees %s", PATIENCE, path)
        while not _finished(path) and time.monotonic() < end:
            time.sleep(0.5)

    def _read(self, step: int, want: dict | None) -> tuple[dict, str | None]:
        """(arrays, None) of a checkpoint, or ({}, why it cannot be trusted)."""
        path, arrays, reason = self.directory / str(step), {}, None
        self._await(path)
        try:
            record = _record(path)
            self._check(step, {name: kind for name, (kind, _) in record.items()}, want)
            whole = ocp.RestoreArgs(restore_type=np.ndarray)
            args = {name: _target(want[name]) if want else whole for name in want or record}
            arrays = self._handler.restore(
                epath.Path(str(path)), args=ocp.args.PyTreeRestore(restore_args=args)
            )
            arrays = {name: arrays[name] for name in args}
        except (CheckpointError, jax.errors.JaxRuntimeError):  # out of memory is no damage
            raise
        except Exception as error:
            reason = _reason(error)
        if not (agreed(reason is None) if want is not None else reason is None):
            return {}, reason or "another process cannot read it"
        digests = digest(arrays)
        wrong = [name for name in digests if digests[name] != record[name][1]]
        return ({}, f"damaged: {', '.join(wrong[:5])}") if wrong else (arrays, None)

    def _check(self, step: int, disk: dict[str, str], want: dict | None) -> None:
        """Raise CheckpointError where the checkpoint has other arrays than the state."""
        here = disk if want is None else {name: _kind(x) for name, x in want.items()}
        if lines := _difference(disk, here):
            more = [f"... and {len(lines) - 8} more"] if len(lines) > 8 else []
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is of another state (was the recipe or "
                "an override changed since?):\n  " + "\n  ".join(lines[:8] + more)
            )


def load(directory: epath.PathLike | Remote, step: int | None = None) -> Tree:
    """The newest state that verifies as nested dicts of NumPy arrays, no recipe needed.

    Lists and tuples come back as dicts with keys "0", "1", ...; typed keys as their uint32 data.
    A process may call it alone. Raises CheckpointError if there is none, or none of `step`.
    """
    checkpoints = Checkpoints(directory)
    newest = checkpoints._walk(None, step)
    checkpoints.close()
    if newest is None:
        raise CheckpointError(f"there is no checkpoint in {checkpoints.directory}")
    nested: dict = {}
    for path, x in newest[1].items():
        *parents, name = path.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = x
    return nested
