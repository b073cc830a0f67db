"""Contrast two views of an example with all others of the batch."""

from dataclasses import dataclass
from typing import Literal

from sslx.models.encoder import Encoder, encoder
from sslx.models.heads import Siamese
from sslx.objectives.base import Objective, apply, init, pair, variables
from sslx.ops.chunks import in_chunks
from sslx.ops.health import embedding_metrics
from sslx.ops.losses import nt_xent
from sslx.types import Array, Batch, Buffers, Metrics, Params


@dataclass(frozen=True)
class SimCLR(Objective):
    """Tell the other view of an example among all views of the batch (arXiv:2002.05709).

    batch    image [B, 2, H, W, C]
    buffers  stats

    Both views pass the net as one batch of 2 B, so BatchNorm sees them together, as published.

    With `chunks` the encoder sees a part of the batch at a time and the similarity matrix is never
    whole; the projector, the loss and its negatives are still those of the whole batch. For an
    encoder that couples no examples (ViT) loss and gradient stay exactly those of the whole batch.
    BatchNorm in an encoder normalizes each chunk by itself (ghost statistics, arXiv:1705.08741),
    which is another net: its running statistics move once, by the mean over chunks.
    """

    net: Siamese
    temperature: float = 0.1
    # The mean over all 2 B anchors (the paper's algorithm 1; solo-learn, lightly), or the sum of
    # the two directions' means: twice that (google-research/simclr, `objective.py`).
    reduction: Literal["anchors", "directions"] = "directions"
    chunks: int = 1

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: similarities are divided by it, so it is above "
                f"0; the published ones are 0.1 on ImageNet and 0.5 on CIFAR-10."
            )
        if self.reduction not in ("anchors", "directions"):
            raise ValueError(f"reduction={self.reduction!r}: use 'anchors' or 'directions'.")
        if self.chunks < 1:
            raise ValueError(f"chunks={self.chunks}: it counts parts of the batch, from 1.")
        if self.net.predictor is not None:
            raise ValueError("SimCLR has no predictor: use Siamese(encoder, projector).")

    def init(self, key: Array, batch: Batch) -> tuple[Params, Buffers]:
        params, stats = init(self.net, key, pair(self, batch)[:, 0])
        return params, {"stats": stats}

    def loss(
        self, params: Params, buffers: Buffers, batch: Batch, key: Array, step: Array
    ) -> tuple[Array, tuple[Buffers, Metrics]]:
        image = pair(self, batch)

        def encode(image):  # [B, 2, H, W, C] -> [B, 2, D]; the flat batch stays where it was
            flat = image.reshape(-1, *image.shape[2:])
            h, stats = apply(self.net, params, buffers["stats"], flat, method="encode")
            return h.reshape(*image.shape[:2], -1), stats

        h, stats = in_chunks(encode, image, self.chunks)
        flat = h.reshape(-1, h.shape[-1])
        z, stats = apply(self.net, params, stats, flat, method="project")
        z = z.reshape(*h.shape[:2], -1)  # [B, 2, P]
        loss = nt_xent(z, self.temperature, self.chunks).mean()
        loss = loss if self.reduction == "anchors" else 2 * loss
        return loss, ({"stats": stats}, embedding_metrics(h, z))

    def encoders(self, params: Params, buffers: Buffers) -> dict[str, Encoder]:
        own = variables("encoder", params, buffers["stats"])
        return {"encoder": encoder(self.net.encoder, own)}

    def coupling(self, buffers: Buffers) -> str:
        return (
            "NT-Xent compares every example with the whole batch, of which a micro-batch has only "
            "a part: use objective.chunks, which gives the gradient of the whole batch"
        )
