"""Audits for silent data corruption: a step computed twice, and copies that must be equal.

A device that computes or stores wrong bits raises no error. An audit looks for one in two ways.
Over time: from one state and batch, the same program must leave the same bits on each device. Over
copies: devices that hold the same part of an array must hold the same bits, before and after the
step. Digests are compared, a few bytes for each array and device.
"""

import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sslx.checkpoint import Checkpoints
from sslx.digest import device_digests, named
from sslx.log import Log
from sslx.processes import agreed, hosts
from sslx.state import TrainState
from sslx.types import Array, Batch, Metrics, Tree

WHEN_COMPUTED_AGAIN = (
    "when the step was computed again (if these are all devices, one erred before gradients were "
    "summed, or the step differs from run to run, as a GPU's does without "
    "xla_gpu_exclude_nondeterministic_ops)"
)

Suspects = dict[str, np.ndarray]  # path of an array -> the devices in question, bool [*mesh]
Finding = tuple[Suspects, str, str]  # these devices "had other bits of" these arrays "then"


class Corrupted(RuntimeError):
    """A device holds other bits than its copies, or computed a step otherwise the second time."""

    code = 4


class Audit:
    """The run's step, `(step, state, batch) -> (state, metrics)`, audited every `every` steps.

    An audit holds the state twice and takes the time of two steps. What it cannot find: an error
    that repeats itself before gradients are summed, for all devices then agree; and a bit flipped
    between two steps in a part of an array that one device alone holds, as with fsdp over all.
    """

    def __init__(
        self,
        every: int | None,
        step_fn: Callable,
        mesh: jax.sharding.Mesh,
        log: Log,
        checkpoints: Checkpoints,
    ):
        self.every, self.step_fn, self.mesh = every, step_fn, mesh
        self.log, self.checkpoints = log, checkpoints
        self.clean: int | None = None  # the step of the last audit of this process

    def __call__(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if self.every is None or step % self.every:
            return self.step_fn(state, batch)
        begin = time.perf_counter()
        held = named(state) | {f"batch/{name}": x for name, x in batch.items()}
        before = device_digests(held, self.mesh)
        first, _ = self.step_fn(copied(state), batch)
        once = device_digests(named(first), self.mesh)
        del first  # the second needs the room
        state, metrics = self.step_fn(state, batch)
        moved = named(state)
        twice = device_digests(moved, self.mesh)
        before, once, twice = jax.device_get((before, once, twice))
        changed = [(a != b).any(-1) for a, b in zip(once, twice, strict=True)]
        changed = {path: x for path, x in zip(moved, changed, strict=True) if x.any()}
        findings = [*unlike_copies(held, before, "before the step")]
        findings += [(changed, "left other bits of", WHEN_COMPUTED_AGAIN)] if changed else []
        findings += unlike_copies(moved, twice, "after the step")
        if not agreed(not findings):
            raise Corrupted(f"Step {step}: silent data corruption. {self.message(findings)}")
        self.clean = step
        self.log.write(step, {"audit/seconds": time.perf_counter() - begin})
        return state, metrics

    def message(self, findings: list[Finding]) -> str:
        """Which devices the first finding is about, and what to do; all processes call it."""
        names = hosts()
        if not findings:
            return "Another process found it; its message names the device."
        suspects, had, when = findings[0]
        devices = self.mesh.devices[np.any(list(suspects.values()), 0)].tolist()
        shown = [described(device, names) for device in devices[:8]]
        shown += [f"{len(devices) - 8} more"] if len(devices) > 8 else []
        arrays = list(suspects)
        of = ", ".join(arrays[:3]) + f" and {len(arrays) - 3} more arrays" * (len(arrays) > 3)
        return (
            f"{', '.join(shown)} {had} {of} {when}. Take the machine out before the run goes on. "
            f"{self.advice()}"
        )

    def advice(self) -> str:
        """Which checkpoints to trust."""
        self.checkpoints.wait()
        clean, steps = self.clean or 0, self.checkpoints.good()
        doubtful = [str(s) for s in steps if s > clean or self.clean is None]
        since = f"The last audit without a finding was at step {clean}"
        since = since if self.clean is not None else "This process has made no audit before"
        if not doubtful:
            return f"{since}, and no checkpoint is from after it."
        return (
            f"{since}: the checkpoints of step {', '.join(doubtful)} may hold the error; remove "
            f"them from {self.checkpoints.directory} to go on from one that does not."
        )


def copied(state: Tree) -> Tree:
    """A copy of all arrays, on the same devices."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten(_copies(tuple(x.sharding for x in leaves))(leaves))


@functools.lru_cache(maxsize=8)
def _copies(shardings: tuple) -> Callable:
    return jax.jit(lambda leaves: [jnp.copy(x) for x in leaves], out_shardings=list(shardings))


def unlike_copies(arrays: dict[str, Array], digests: np.ndarray, when: str) -> list[Finding]:
    """The arrays whose copies differ, with the devices that hold the rarest value; and those all of
    whose values are equally rare, with all devices that hold that part of the array.

    digests  of each array and device, uint32 [arrays, *mesh, 2]

    The rarest, not all but the most frequent: what a wrong param did to gradients is shared by
    devices that add up theirs, and the param itself by none.
    """
    sure, tied = {}, {}
    for (path, x), lanes in zip(arrays.items(), digests, strict=True):
        names, cut = x.sharding.mesh.axis_names, axes_of(x.sharding.spec)
        axes = sorted(range(len(names)), key=lambda i: names[i] not in cut)
        values = lanes[..., 0].astype(np.uint64) << np.uint64(32) | lanes[..., 1]
        values = values.transpose(axes)  # the axes that cut the array, then those of its copies
        rows = values.reshape(math.prod(x.sharding.mesh.shape[name] for name in cut), -1)
        odd, even = (np.zeros(rows.shape, bool) for _ in range(2))  # [parts, copies]
        for i in np.flatnonzero((rows != rows[:, :1]).any(1)):
            known, counts = np.unique(rows[i], return_counts=True)
            rarest = counts == counts.min()
            odd[i], even[i] = np.isin(rows[i], known[rarest]) & ~rarest.all(), rarest.all()
        for marked, suspects in ((odd, sure), (even, tied)):
            if marked.any():
                suspects[path] = marked.reshape(values.shape).transpose(np.argsort(axes))
    findings = [
        (sure, "had the rarest value of", f"{when}, where copies should be equal"),
        (tied, "had unlike copies of", f"{when}, no value rarer than another"),
    ]
    return [finding for finding in findings if finding[0]]


def axes_of(spec: P) -> set[str]:
    """The axes of the mesh over which an array is cut."""
    names = [part if isinstance(part, tuple) else (part,) for part in spec]
    return {name for part in names for name in part if name is not None}


def described(device: jax.Device, hosts: list[str]) -> str:
    """Which device it is, for whoever looks after the machine."""
    process = device.process_index
    number = jax.local_devices(process).index(device)
    return f"device {device.id} ({device.device_kind}, number {number} of process {process} on " + (
        f"{hosts[process]})"
    )
