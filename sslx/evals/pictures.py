"""A masked autoencoder's reconstructions, as one picture."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.config import Eval, Trained
from sslx.evals.features import Labelled, batches
from sslx.types import Array, Params


@dataclass(frozen=True)
class Reconstructions(Eval):
    """A row for each of the first `count` pictures: whole, masked, reconstructed.

    Needs an objective with `reconstruct(params, batch, key) -> [B, V, H, W, C]`; the same masks
    at every call. `mean` and `std` undo the normalization of the eval view.
    """

    data: Labelled
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int = 8

    def check(self) -> None:
        self.data.check()

    def __call__(self, trained: Trained) -> Iterator[tuple[str, np.ndarray]]:
        with contextlib.closing(batches(self.data, self.count, trained.sharding, 1)) as stream:
            batch, _ = next(stream)
        del batch["label"], batch["valid"]
        panels = jax.device_get(
            _panels(trained.objective, trained.views.eval, trained.sharding, trained.params, batch)
        )[: self.count]
        panels = np.clip(panels * np.asarray(self.std) + np.asarray(self.mean), 0, 1)
        panels = np.rint(panels * 255).astype(np.uint8)
        scale = max(1, 128 // panels.shape[2])  # small pictures are shown large, pixel by pixel
        panels = panels.repeat(scale, axis=2).repeat(scale, axis=3)
        panels = np.pad(panels, ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
        yield "reconstruction", einops.rearrange(panels, "b v h w c -> (b h) (v w) c")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _panels(objective, view, sharding, params: Params, batch) -> Array:
    batch = view(jax.random.key(0), batch)
    panels = objective.reconstruct(params, batch, jax.random.key(1)).astype(jnp.float32)
    if sharding is None:
        return panels
    return jax.lax.with_sharding_constraint(panels, NamedSharding(sharding.mesh, P()))
