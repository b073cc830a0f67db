"""Predict a slow network's embedding of the other view."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from sslx.models.encoder import Encoder, encoder
from sslx.models.heads import Siamese
from sslx.objectives.base import (
    Objective,
    apply,
    each_view,
    init,
    normalized_over_the_batch,
    pair,
    variables,
)
from sslx.ops.health import embedding_metrics
from sslx.ops.losses import regression
from sslx.ops.trees import norm
from sslx.types import Array, Batch, Buffers, Metrics, Params, Schedule, Tree

SLOW = ("encoder", "projector")  # all but the predictor


@dataclass(frozen=True)
class BYOL(Objective):
    """Predict the slow network's embedding of one view from another view (arXiv:2006.07733).

    batch    image [B, 2, H, W, C]
    buffers  stats; target: params and stats of the slow encoder and projector

    As in DeepMind's code: the target starts from a key of its own; only its params follow, after
    the optimizer; it normalizes by its own batch statistics, which are not averaged with the online
    ones; BatchNorm sees each view apart; the loss sums both directions, 0 to 8. The paper's target
    decay is `Cosine(tau, 1, steps)`.
    """

    net: Siamese
    decay: Schedule  # step -> tau, the share of the target that stays

    def init(self, key: Array, batch: Batch) -> tuple[Params, Buffers]:
        image = pair(self, batch)[:, 0]
        fast, slow = jax.random.split(key)
        params, stats = init(self.net, fast, image)
        other, slow_stats = init(self.net, slow, image)
        target = {
            "params": slow_branches(other),
            "stats": {name: slow_branches(x) for name, x in slow_stats.items()},
        }
        return params, {"stats": stats, "target": target}

    def loss(
        self, params: Params, buffers: Buffers, batch: Batch, key: Array, step: Array
    ) -> tuple[Array, tuple[Buffers, Metrics]]:
        stats, target = buffers["stats"], buffers["target"]
        slow_stats, q, z, h, slow = target["stats"], [], [], [], []
        for view in each_view(pair(self, batch)):  # [B, H, W, C]
            (q_v, z_v, h_v), stats = apply(self.net, params, stats, view)  # [B, P], [B, P], [B, D]
            (slow_v, _), slow_stats = apply(
                self.net, target["params"], slow_stats, view, method="embed"
            )
            q, z, h, slow = [*q, q_v], [*z, z_v], [*h, h_v], [*slow, slow_v]
        loss = (regression(q[0], slow[1]) + regression(q[1], slow[0])).mean()
        buffers = {"stats": stats, "target": {**target, "stats": slow_stats}}
        online = jax.lax.stop_gradient(slow_branches(params))
        apart = norm(jax.tree.map(jnp.subtract, online, target["params"]))
        distance = {"target_distance": apart / norm(online)}  # of params, relative
        return loss, (buffers, embedding_metrics(jnp.stack(h, 1), jnp.stack(z, 1)) | distance)

    def update(self, params: Params, buffers: Buffers, step: Array) -> tuple[Params, Buffers]:
        target = buffers["target"]
        moved = optax.incremental_update(
            slow_branches(params), target["params"], 1 - self.decay(step)
        )
        return params, {**buffers, "target": {**target, "params": moved}}

    def encoders(self, params: Params, buffers: Buffers) -> dict[str, Encoder]:
        target = buffers["target"]
        return {
            "online": encoder(self.net.encoder, variables("encoder", params, buffers["stats"])),
            "target": encoder(self.net.encoder, variables("encoder", **target)),
        }

    def coupling(self, buffers: Buffers) -> str:
        return normalized_over_the_batch(buffers["stats"])


def slow_branches(tree: Tree) -> Tree:
    """The branches of a net's params or statistics that the target has: all but the predictor."""
    return {name: tree[name] for name in SLOW if name in tree}
