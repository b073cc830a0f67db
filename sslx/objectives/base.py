"""The interface of every method, four pure functions over pytrees, and helpers for Linen."""

import abc

from flax import linen as nn

from sslx.models.encoder import Encoder
from sslx.types import Array, Batch, Buffers, Metrics, Params, Tree


class Objective(abc.ABC):
    """A pretraining method: its params and buffers, its loss, and the encoders it trains.

    Subclasses are final, frozen dataclasses of Linen modules, numbers and schedules. They see
    global batches and never a gradient, mesh, device, file or collective.
    """

    @abc.abstractmethod
    def init(self, key: Array, batch: Batch) -> tuple[Params, Buffers]:
        """Fresh params and buffers, for a batch as the train view renders it; called under jit."""

    @abc.abstractmethod
    def loss(
        self, params: Params, buffers: Buffers, batch: Batch, key: Array, step: Array
    ) -> tuple[Array, tuple[Buffers, Metrics]]:
        """The scalar to minimize on one global batch, with moved buffers and metrics.

        `key` is another one at each step. Buffers of whole numbers are counts, which add up over
        the micro-batches of a step. Metrics are scalars; the step has its own `loss`,
        `grad_norm`, `param_norm`, `learning_rate` and `skipped`.
        """

    def update(self, params: Params, buffers: Buffers, step: Array) -> tuple[Params, Buffers]:
        """Params and buffers after the optimizer moved the params.

        The place of a slow target's average, of a clamp, of params that are set and not learned.
        """
        del step
        return params, buffers

    @abc.abstractmethod
    def encoders(self, params: Params, buffers: Buffers) -> dict[str, Encoder]:
        """The encoders worth keeping, by name; the first is the default of probes and export."""

    def coupling(self, buffers: Buffers) -> str:
        """Why the batch's loss is not the mean of its micro-batches' losses; empty where it is.

        With a reason `accumulate` above 1 is refused. A loss that is a mean over another number
        of things than examples reports this number as the metric `weight`.
        """
        del buffers
        return ""


def init(net: nn.Module, key: Array, *args, **kwargs) -> tuple[Params, Tree]:
    """Initialize a Linen net for training; returns (params, stats)."""
    stats = dict(net.init(key, *args, train=True, **kwargs))
    return stats.pop("params"), stats


def apply(net: nn.Module, params: Params, stats: Tree, *args, **kwargs) -> tuple[Tree, Tree]:
    """Run a Linen net in training mode; returns (output, moved stats)."""
    variables = {"params": params, **stats}
    out, moved = net.apply(variables, *args, train=True, mutable=list(stats), **kwargs)
    return out, {**stats, **moved}


def each_view(x: Array) -> list[Array]:
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


def normalized_over_the_batch(stats: Tree) -> str:
    """The `coupling` of a net with batch statistics."""
    return "BatchNorm normalizes by the statistics of the whole batch" * bool(stats)


def variables(name: str, params: Params, stats: Tree) -> Tree:
    """The variables of the submodule `name` of a net."""
    own = {collection: tree[name] for collection, tree in stats.items() if name in tree}
    return {"params": params[name], **own}
