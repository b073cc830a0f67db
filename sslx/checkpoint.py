"""Save, verify, restore: the one file that imports orbax.

A checkpoint is a directory named after its step. Orbax writes the arrays, under the paths of the
state (`params/encoder/kernel`), and commits them by a rename; a record of each array's dtype,
shape and digest is committed with them. Orbax loads a flipped bit without a word (24 of 24
tried), so what is restored is digested again: the newest checkpoint that verifies is used.
"""

import json
import logging
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax
from jax.experimental import multihost_utils

from sslx.types import Array, Tree

Leaf = Array | np.ndarray | jax.ShapeDtypeStruct  # of a state, on the host, or to be restored

log = logging.getLogger("sslx")


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


# ---- digest ----


def digest(state: Tree) -> dict[str, int]:
    """A 64-bit digest of each array, by its path; sharding and device do not change it.

    Two sums over all elements, mod 2**32, of functions of (bits, position), each one-to-one in
    the bits. So a change within one 32-bit word shows for certain, in both; of other changes one
    in 2**64 is missed (one in 2**32 if it touches highest bits only, where the first is blind).
    """
    digests = {}
    for path, x in _named(state).items():  # one by one: forced host devices deadlock on 32
        a, b = jax.device_get(_lanes(_words(x)))
        digests[path] = int(a) << 32 | int(b)
    return digests


def _words(x: Leaf) -> Array:
    """The array on the device as plain numbers; 64-bit NumPy ones as two words, as jax has 32."""
    if isinstance(x, jax.Array):
        return _data(x)
    x = np.asarray(x)
    wide = x.dtype.itemsize == 8 and x.dtype.kind in "iuf"
    return jax.device_put(x[..., None].view(np.uint32) if wide else x)


@jax.jit
def _lanes(x: Array) -> tuple[Array, Array]:
    """The two sums of a digest: scalars, replicated on any mesh, from one reduction.

    (On the CPU two sums would store both terms: 400 MB in 7.7 s with 800 MB on top, not 0.16 s.)
    """
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")  # 64 bits: [..., 2]
    bits, place = bits.astype(jnp.uint32), jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):  # coordinates, for a flat index overflows at 2**32
        index = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = _mix(place + (index ^ jnp.uint32(0x9E3779B9)))
    terms, zeros = (bits * (place | jnp.uint32(1)), _mix(bits ^ place)), (np.uint32(0),) * 2
    return lax.reduce(terms, zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), range(bits.ndim))


def _mix(x: Array) -> Array:
    """MurmurHash3's finalizer, a permutation of uint32 (A. Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# ---- states as flat dicts ----


def _named(tree: Tree) -> dict[str, Leaf]:
    """{path: leaf} of a pytree; empty containers are left out."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs}
    if len(named) < len(pairs):
        raise ValueError("two arrays of the state have the same path: a name contains a slash")
    return named


def _is_key(x: Leaf) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _data(x: Leaf) -> Leaf:
    return jax.random.key_data(x) if _is_key(x) else x


def _kind(x: Leaf) -> str:
    """The dtype and shape of a leaf as text, such as `float32[3,4]` or `key<fry>[]`."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _like(abstract: Leaf, x: Array) -> Array:
    """A restored array as a typed key again, where the abstract leaf is one."""
    if not _is_key(abstract):
        return x
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(jnp.empty((), abstract.dtype)))


def _target(x: Leaf) -> ocp.RestoreArgs:
    """How orbax restores a leaf: with its sharding, else on the first local device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shape = jax.eval_shape(_data, x).shape
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


def _record(path: epath.Path) -> dict[str, list]:
    """{path: [kind, digest]} as saved; raises if the record is missing or damaged."""
    record = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    if record != _seal(record["arrays"]):
        raise ValueError("the record of the arrays is damaged")
    return record["arrays"]


def _finished(path: epath.Path) -> bool:
    """Whether it was committed, even if it was damaged later: either of two markers is enough."""
    if not path.name.isdecimal() or (path / "commit_success.txt").exists():
        return path.name.isdecimal()
    try:
        return bool(_record(path))
    except Exception:
        return False


def _reason(error: BaseException) -> str:
    """The first cause of an error in one line, without tensorstore's details."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).partition("[tensorstore_spec=")[0].partition("\n")[0]
    text = text if len(text) < 400 else f"{text[:150]} ... {text[-250:]}"
    return f"{type(error).__name__}: {text.strip()}"


def _all(ok: bool, together: bool) -> bool:
    """Whether `ok` holds on every process, so that none goes on alone and waits forever."""
    if not together or jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def _say(level: int, message: str, *args) -> None:
    if jax.process_index() == 0:
        log.log(level, message, *args)


class Checkpoints:
    """The checkpoints of one run, in one directory; all processes call every method together."""

    def __init__(self, directory: epath.PathLike, keep: Retention = Retention()):
        remote = "://" in str(directory)
        self.directory = epath.Path(directory) if remote else epath.Path(directory).absolute()
        self.keep = keep
        # Compression saves 8 % of float32 weights and takes seven times as long.
        self._handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        self._orbax = self._writer()
        self._worker = ThreadPoolExecutor(1, "sslx-checkpoint")
        self._pending: Future | None = None
        self._current: int | None = None  # the step last saved or restored
        self._bad: set[int] = set()  # steps that this process saw fail

    def _writer(self) -> ocp.AsyncCheckpointer:
        """An orbax writer that makes directories in the foreground, where failures are seen."""
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        return ocp.AsyncCheckpointer(self._handler, async_options=options)

    def steps(self) -> list[int]:
        """The steps of all finished checkpoints on disk, oldest first, verified or not."""
        return sorted(int(path.name) for path in self._attempts() if _finished(path))

    def _attempts(self) -> list[epath.Path]:
        """The paths of all checkpoints, also those unfinished or left by a kill."""
        entries = self.directory.iterdir() if self.directory.exists() else []
        return [path for path in entries if path.name.split(".")[0].isdecimal()]

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
        with jax.transfer_guard("allow"):  # the copy off the device is what this is for
            named, digests = _named(state), digest(state)
            record = _seal({path: [_kind(x), digests[path]] for path, x in named.items()})
            tree = ocp.args.PyTreeSave({path: _data(x) for path, x in named.items()})
            target = self.directory / str(step)
            try:
                self._sweep()
                self._orbax.save(target, args=tree, custom_metadata=record, force=True)
            except OSError as error:
                return self._lost(step, error)
        self._pending = self._worker.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            return self._lost(step, error)
        self._current = step
        self._bad.discard(step)
        # Checkpoints of later steps, of a run that went back, are neither counted nor removed.
        try:
            good = [s for s in self.steps() if s <= step and s not in self._bad]
            for old in self.keep.stale(good):
                self._remove(self.directory / str(old))
        except OSError as error:
            _say(logging.WARNING, "old checkpoints stay (%s)", _reason(error))

    def _lost(self, step: int, error: Exception) -> None:
        self._orbax = self._writer()  # the old one would raise it again
        try:
            self._sweep()
            good = [s for s in self.steps() if s not in self._bad]
            rest = f"the newest good one is step {good[-1]}" if good else "there is no other"
        except OSError as gone:
            rest = f"the others cannot be read ({_reason(gone)})"
        message = "checkpoint of step %d is lost (%s); %s; the run goes on"
        _say(logging.ERROR, message, step, _reason(error), rest)

    def _sweep(self) -> None:
        """Remove half-written attempts; called while none of this run is under way."""
        for path in self._attempts():
            if not _finished(path):
                self._remove(path)

    def _remove(self, path: epath.Path) -> None:
        if jax.process_index() == 0:
            try:
                path.rmtree()
            except OSError as error:
                _say(logging.WARNING, "%s could not be deleted (%s)", path, _reason(error))

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

    def restore(self, abstract: Tree, step: int | None = None) -> tuple[int, Tree] | None:
        """The newest state that verifies, sharded as `abstract` says; None if none was ever saved.

        `abstract` is ShapeDtypeStructs with shardings, on any mesh. With `step`, that one only.
        Raises CheckpointError if there are checkpoints and none verifies (starting from scratch
        would be silent loss), or if one belongs to another state.
        """
        self.wait()
        with jax.transfer_guard("allow"):
            newest = self._walk(_named(abstract), step)
            if newest is None:
                return None
            self._current, arrays = newest
            leaves, treedef = jax.tree.flatten(abstract)
            return self._current, treedef.unflatten(map(_like, leaves, arrays.values()))

    def _walk(self, want: dict | None, step: int | None) -> tuple[int, dict] | None:
        """(step, arrays) of the newest checkpoint that verifies; says which did not, and why."""
        for path in self._attempts():
            if not _finished(path):
                _say(logging.WARNING, "checkpoint skipped: %s is not finished", path)
        steps, skipped = self.steps() if step is None else [step], []
        if want is not None and jax.process_count() > 1:  # a shared disk may show them unequal
            newest = np.asarray(([-1] * 64 + steps)[-64:], np.int32)
            steps = [int(s) for s in multihost_utils.broadcast_one_to_all(newest) if s >= 0]
        for candidate in reversed(steps):
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

    def _read(self, step: int, want: dict | None) -> tuple[dict, str | None]:
        """(arrays, None) of a checkpoint, or ({}, why it cannot be trusted)."""
        path, arrays, reason = self.directory / str(step), {}, None
        try:
            record = _record(path)
            self._check(step, {name: kind for name, (kind, _) in record.items()}, want)
            whole = ocp.RestoreArgs(restore_type=np.ndarray)
            args = {name: _target(want[name]) if want else whole for name in want or record}
            arrays = self._handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
            arrays = {name: arrays[name] for name in args}
        except (CheckpointError, jax.errors.JaxRuntimeError):  # out of memory is no damage
            raise
        except Exception as error:
            reason = _reason(error)
        if not _all(reason is None, want is not None):
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


def load(directory: epath.PathLike, step: int | None = None) -> Tree:
    """The newest state that verifies as nested dicts of NumPy arrays, no recipe needed.

    Lists and tuples come back as dicts with keys "0", "1", ...; typed keys as their uint32 data.
    A process may call it alone. Raises CheckpointError if there is none, or none of `step`.
    """
    checkpoints = Checkpoints(directory)
    if step is not None and step not in (steps := checkpoints.steps()):
        raise CheckpointError(f"{directory} has no checkpoint of step {step}, only of {steps}.")
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
