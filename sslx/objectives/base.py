"""What every method is: four pure functions over pytrees, and three helpers around Linen."""

import abc

from flax import linen as nn

from sslx.types import Array, Batch, Buffers, Metrics, Params, Tree


class Objective(abc.ABC):
    """Something to minimize, to a training step what an optax transformation is to a gradient.

    Subclasses are final, frozen dataclasses of Linen modules, numbers and schedules. They see
    global batches and never a gradient, mesh, device, file or collective.
    """

    @abc.abstractmethod
    def init(self, key: Array, batch: Batch) -> tuple[Params, Buffers]:
        """Fresh params and buffers; traced, never run eagerly, so nothing aliases."""

    @abc.abstractmethod
    def loss(
        self, params: Params, buffers: Buffers, batch: Batch, key: Array, step: Array
    ) -> tuple[Array, tuple[Buffers, Metrics]]:
        """The scalar to minimize on one global batch, with moved buffers and scalar metrics."""

    def update(self, params: Params, buffers: Buffers, step: Array) -> Buffers:
        """Buffers after the optimizer moved params; the place of a slow target's average."""
        del params, step
        return buffers

    @abc.abstractmethod
    def backbone(self, params: Params, buffers: Buffers) -> tuple[nn.Module, Tree]:
        """The encoder worth keeping and its variables; applied to x it gives tokens [B, N, D]."""


def init(net: nn.Module, key: Array, *args, **kwargs) -> tuple[Params, Tree]:
    """Initialize a Linen net for training; returns (params, stats)."""
    stats = dict(net.init(key, *args, train=True, **kwargs))
    return stats.pop("params"), stats


def apply(net: nn.Module, params: Params, stats: Tree, *args, **kwargs) -> tuple[Tree, Tree]:
    """Run a Linen net in training mode; returns (output, moved stats)."""
    variables = {"params": params, **stats}
    out, moved = net.apply(variables, *args, train=True, mutable=list(stats), **kwargs)
    return out, {**stats, **moved}


def views(x: Array) -> list[Array]:
    """[B, V, ...] -> V arrays [B, ...]."""
    return [x[:, v] for v in range(x.shape[1])]


def pair(objective: Objective, batch: Batch) -> Array:
    """The image [B, 2, H, W, C] of a batch; raises ValueError for any other number of views."""
    image, name = batch["image"], type(objective).__name__
    if image.ndim != 5 or image.shape[1] != 2:
        count = image.shape[1] if image.ndim == 5 else 1
        made = "one view" if count == 1 else f"{count} views"
        raise ValueError(
            f"{name} reads image [B, 2, H, W, C] but got {list(image.shape)}: "
            f"the recipe's views make {made}; use views.{name.lower()}(size)."
        )
    return image


def variables(name: str, params: Params, stats: Tree) -> Tree:
    """The variables of the submodule `name` of a net."""
    own = {collection: tree[name] for collection, tree in stats.items() if name in tree}
    return {"params": params[name], **own}
