"""The mesh of devices, and how arrays are sharded over it by their logical axes."""

import functools
import logging
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.chips import CHIPS, chip_of
from sslx.ops.trees import boxed
from sslx.types import Array, Tree

log = logging.getLogger("sslx")
AXES = ("replica", "fsdp", "tensor")

# A logical axis and the mesh axes that it may be cut over.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "vocab": ("tensor",),
}

# A leaf that names no axes is cut over fsdp from this size on; below, a copy is cheaper.
MIN_SIZE = 2**14


@dataclass(frozen=True)
class Mesh:
    """How many ways the devices of a slice are split; -1 on one axis takes all that remain.

    replica: whole copies. fsdp: params, moments and batch. tensor: heads, MLP, vocabulary. Slices
    of TPUs are copies of one another. One device is a mesh of size one, not another code path.

    None leaves it to `build`: the state is cut over as few ways as an eighth of the memory asks
    for, and what remains are copies. Cut finer it would only be sent more often (launch/README.md).
    """

    replica: int | None = None
    fsdp: int | None = None
    tensor: int = 1

    def build(
        self, devices: Sequence[jax.Device] | None = None, state: int = 0
    ) -> jax.sharding.Mesh:
        """The jax mesh over `devices` (all of them by default), axes (replica, fsdp, tensor).

        `state` is the bytes of a run's state. Between slices only gradients go: the axis replica is
        theirs, times `replica`. Hosts of GPUs are joined by whatever axis comes out, tensor within
        them. Raises ValueError when the axes do not multiply to the devices of a slice.
        """
        devices = list(jax.devices() if devices is None else devices)
        slices = len({slice_of(device) for device in devices})
        of = "" if slices == 1 else " of each slice"
        chip = CHIPS.get(chip_of(devices[0].device_kind))
        least = math.ceil(state / (chip.memory / 8)) if chip and state else len(devices)
        shape = self._shape(len(devices) // slices, of, least)
        try:
            if slices == 1:
                grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            else:
                grid = mesh_utils.create_hybrid_device_mesh(
                    shape, (slices, 1, 1), devices, allow_split_physical_axes=True
                )
        except NotImplementedError as error:
            raise ValueError(
                f"{self} does not lie on {slices} slices of {len(devices) // slices} "
                f"{devices[0].device_kind} ({error}): use powers of two, or tensor=1."
            ) from error
        return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)

    def _shape(self, devices: int, of: str, least: int) -> tuple[int, int, int]:
        """`least` ways are enough for the state."""
        sizes = [self.replica, self.fsdp, self.tensor]
        if -1 not in sizes and None in sizes:
            if sizes[:2] == [None, None]:
                sizes[1] = enough(devices // max(self.tensor, 1), least / max(self.tensor, 1))
            sizes[sizes.index(None)] = -1
        sizes = [1 if n is None else n for n in sizes]
        known = math.prod(n for n in sizes if n != -1)
        if sizes.count(-1) == 1 and known > 0 and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
        if min(sizes) < 1 or math.prod(sizes) != devices:
            reason = f"replica * fsdp * tensor must be {devices}; put -1 on the one axis that takes"
            reason += " what remains"
            if sizes.count(-1) == 1 and known > 0:
                reason = f"their number must be a multiple of {known}"
            raise ValueError(f"{self} does not cover {devices} devices{of}: {reason}.")
        return tuple(sizes)


def enough(devices: int, least: float) -> int:
    """The smallest divisor of `devices` that is not below `least`; all of them if none is."""
    return next((n for n in range(1, devices) if devices % n == 0 and n >= least), devices)


def slice_of(device: jax.Device) -> int:
    """The number of a TPU's slice, 0 where there is one. (A GPU's slice_index is its host.)"""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def spec(names: Sequence[str | None], shape: Sequence[int], mesh, otherwise=None) -> P:
    """Logical names of an array's axes -> its PartitionSpec on `mesh`.

    A mesh axis is used once, by the first name that asks for it. An axis that does not divide is
    said once, and is `otherwise`: None, whole on every device, or P.UNCONSTRAINED, which leaves it
    to the compiler. Raises ValueError where that is the batch: every device would compute all.
    """
    out, used = [], set()
    for name, size in zip(names, shape, strict=True):
        axes = tuple(a for a in RULES.get(name, ()) if a not in used)
        parts = math.prod(mesh.shape[a] for a in axes)
        if not axes:
            out.append(None)
        elif size % parts == 0:
            used.update(axes)
            out.append(axes)
        elif name == "batch":
            raise ValueError(
                f"An array {list(shape)} has {size} examples on its batch axis, which replica * "
                f"fsdp = {parts} devices do not divide: use a larger batch_size, or cut it into "
                f"fewer chunks."
            )
        else:
            _say_whole(name, size, " * ".join(axes), parts)
            out.append(otherwise)
    return P(*out)


@functools.cache
def _say_whole(name: str, size: int, axes: str, parts: int) -> None:
    if jax.process_index() == 0:
        log.warning(
            "%d %s do not divide over %s = %d devices: what has this axis stays whole on each",
            *(size, name, axes, parts),
        )


def constrain(x: Array, *names: str | None) -> Array:
    """Pin an activation to the mesh by its logical axes; outside a mesh, `x` itself.

    One missing constraint on the residual stream costs 4 to 59 times the memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    where = spec(names, x.shape, mesh, P.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, where)


def shardings(state: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """The NamedSharding of every leaf of an abstract state whose params still carry axis names."""

    def sharding(leaf) -> NamedSharding:
        if boxed(leaf):
            return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, _by_size(leaf.shape, mesh))

    return jax.tree.map(sharding, state, is_leaf=boxed)


def _by_size(shape: Sequence[int], mesh) -> P:
    """The largest dimension that fsdp divides, for a large leaf without names."""
    if math.prod(shape) >= MIN_SIZE:
        for axis in np.argsort(shape)[::-1]:
            if shape[axis] % mesh.shape["fsdp"] == 0:
                return P(*[None] * int(axis), "fsdp")
        _say_whole(f"rows of {list(shape)}", max(shape), "fsdp", mesh.shape["fsdp"])
    return P()


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Axis 0, the example, over replicas and fsdp."""
    return NamedSharding(mesh, P(RULES["batch"]))


def rows_here(batch_size: int, sharding: NamedSharding) -> tuple[int, ...]:
    """The rows of a global batch that this process's devices hold, ascending.

    Which they are is for the order of devices in the mesh to say: they need not follow one another,
    and where the tensor axis crosses hosts, several processes hold the same.
    """
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for [rows] in held for row in range(batch_size)[rows]}))


def placed(batch: Mapping[str, np.ndarray], rows: Sequence[int], batch_size: int, sharding) -> dict:
    """Global arrays of a batch of which this process holds `rows`, on the devices.

    Raises ValueError for an array that has not a row for each of them.
    """

    index = sharding.addressable_devices_indices_map((batch_size,))
    devices = {device: range(batch_size)[rows] for device, [rows] in index.items()}

    def place(name: str, local: np.ndarray) -> Array:
        if len(local) != len(rows):
            raise ValueError(f"{name} has {len(local)} rows, but this process feeds {len(rows)}.")

        parts = []
        for held in devices.values():  # a device's rows follow one another
            first = bisect_left(rows, held[0])
            parts.append(local[first : first + len(held)])
        shape, parts = (batch_size, *local.shape[1:]), jax.device_put(parts, list(devices))
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return {name: place(name, local) for name, local in batch.items()}


def ways(mesh: jax.sharding.Mesh) -> int:
    """The number of parts that a batch is cut into."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: jax.sharding.Mesh, accumulate: int = 1) -> None:
    """Raise ValueError when a global batch, or a micro-batch of it, cannot be cut over the mesh."""
    parts = ways(mesh)
    unit = parts * accumulate
    if batch_size % unit:
        micro = f" in accumulate={accumulate} micro-batches" if accumulate > 1 else ""
        raise ValueError(
            f"batch_size={batch_size} does not divide over replica * fsdp = {parts} devices"
            f"{micro}: use a multiple of {unit}, such as "
            f"batch_size={-(-batch_size // unit) * unit}."
        )
