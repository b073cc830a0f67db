"""A digest of every array of a state, taken where the arrays are, and a state as a flat dict."""

import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.ops.bits import mixed
from sslx.types import Array, Tree

NO_MESH = jax.sharding.Mesh(np.empty((), object), (), axis_types=())

Leaf = Array | np.ndarray | jax.ShapeDtypeStruct  # of a state, on the host, or to be restored


def digest(state: Tree) -> dict[str, int]:
    """A 64-bit digest of each array, by its path; sharding and device do not change it.

    Two sums over all elements, mod 2**32, of functions of (bits, position), each one-to-one in
    the bits. So a change within one 32-bit word shows for certain, in both; of other changes one
    in 2**64 is missed (one in 2**32 if it touches highest bits only, where the first is blind).

    The arrays of a mesh are digested by one program and fetched at once; those of the host one
    after another, for a device may have no room for all.
    """
    arrays = named(state)
    groups: dict[Hashable, list[str]] = {}
    for path, x in arrays.items():
        where = frozenset(x.sharding.device_set) if on_device(x) else path
        groups.setdefault(where, []).append(path)
    digests = {}
    with jax.set_mesh(NO_MESH):  # one program, in the loop and outside
        for paths in groups.values():
            pairs = jax.device_get(_lanes([_words(arrays[path]) for path in paths]))
            values = (int(a) << 32 | int(b) for a, b in pairs)
            digests |= dict(zip(paths, values, strict=True))
    return {path: digests[path] for path in arrays}


def device_digests(arrays: dict[str, Array], mesh: jax.sharding.Mesh) -> Array:
    """The digest of what each device of `mesh` holds of each array, uint32 [arrays, *mesh, 2].

    Each device digests its own part, and all processes get all digests. The arrays' shardings are
    NamedShardings of `mesh`.
    """
    specs = tuple(x.sharding.spec for x in arrays.values())
    return _by_device(tuple(arrays.values()), specs, mesh)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _by_device(arrays: tuple[Array, ...], specs: tuple[P, ...], mesh) -> Array:
    def own(*parts: Array) -> Array:
        sums = jnp.stack([jnp.stack(_sums(x)) for x in parts])
        return sums.reshape(len(parts), *[1] * mesh.devices.ndim, 2)

    out = P(None, *mesh.axis_names)
    digests = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return lax.with_sharding_constraint(digests(*map(data, arrays)), NamedSharding(mesh, P()))


def on_device(x: Leaf) -> bool:
    return isinstance(x, jax.Array)


def _words(x: Leaf) -> Array:
    """The array on the device as plain numbers; 64-bit NumPy ones as two words, as jax has 32."""
    if on_device(x):
        return data(x)
    x = np.asarray(x)
    wide = x.dtype.itemsize == 8 and x.dtype.kind in "iuf"
    return jax.device_put(x[..., None].view(np.uint32) if wide else x)


@jax.jit
def _lanes(arrays: list[Array]) -> Array:
    """The two sums of each array's digest, uint32 [n, 2], replicated on any mesh."""
    return jnp.stack([jnp.stack(_sums(x)) for x in arrays])


@jax.jit  # traced once for all arrays of a shape, as params and their moments are
def _sums(x: Array) -> tuple[Array, Array]:
    """The two sums of a digest, from one reduction.

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
        place = mixed(place + (index ^ jnp.uint32(0x9E3779B9)))
    terms, zeros = (bits * (place | jnp.uint32(1)), mixed(bits ^ place)), (np.uint32(0),) * 2
    return lax.reduce(terms, zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), range(bits.ndim))


# ---- states as flat dicts ----


def named(tree: Tree) -> dict[str, Leaf]:
    """{path: leaf} of a pytree; empty containers are left out."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs}
    if len(leaves) < len(pairs):
        raise ValueError("two arrays of the state have the same path: a name contains a slash")
    return leaves


def is_key(x: Leaf) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def data(x: Leaf) -> Leaf:
    """The numbers of a typed key; any other array as it is."""
    return jax.random.key_data(x) if is_key(x) else x
