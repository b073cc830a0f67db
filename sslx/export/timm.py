"""timm checkpoints: one safetensors file, written without torch or timm."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sslx.export import keymaps
from sslx.export.hf import backbone
from sslx.models.resnet import ResNet
from sslx.models.vit import ViT
from sslx.objectives.base import Objective
from sslx.types import Buffers, Params


def save(
    objective: Objective,
    params: Params,
    path: Path | str,
    image_size: int | tuple[int, int],
    buffers: Buffers | None = None,
) -> None:
    """Write the encoder as `timm.create_model(..., num_classes=0)` loads it, strictly.

    A ResNet's names and arrays are torchvision's too, batch statistics included; where its stem is
    not ImageNet's of 64 channels, the model that reads it needs that stem in place of its own.
    Raises ValueError for another backbone and for an image that a ViT's patches do not divide.
    """
    encoder, variables = backbone(objective, params, buffers)
    if isinstance(encoder, ResNet):
        arrays = keymaps.write(keymaps.timm_resnet(encoder), variables, {})
        arrays |= keymaps.counts(arrays)
    else:
        arrays = _vit(encoder, variables["params"], image_size)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path, metadata={"format": "pt"})


def _vit(encoder: ViT, weights: Params, image_size: int | tuple[int, int]) -> dict[str, np.ndarray]:
    """No mask token is among them: it would make timm take them for DINOv2's and rename them."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if any(side % encoder.patch for side in sides):
        raise ValueError(f"Images of {image_size} do not divide into patches of {encoder.patch}.")
    channels = len(weights["patch"]["kernel"]) // encoder.patch**2
    of_encoder = keymaps.sizes(encoder, encoder.patch, channels)
    arrays = keymaps.write(keymaps.TIMM_VIT, weights, of_encoder)
    rows, columns = (side // encoder.patch for side in sides)
    return arrays | {"pos_embed": keymaps.positions(rows, columns, encoder.width)}
