"""timm checkpoints: one safetensors file, written without torch or timm."""

from pathlib import Path

from safetensors.numpy import save_file

from sslx.export import keymaps
from sslx.export.hf import backbone
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

    No mask token is among the arrays: it would make timm take them for DINOv2's and rename them.
    Raises ValueError for a backbone that is no ViT and an image that patches do not divide.
    """
    encoder, weights = backbone(objective, params, buffers)
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if any(side % encoder.patch for side in sides):
        raise ValueError(f"Images of {image_size} do not divide into patches of {encoder.patch}.")
    channels = len(weights["patch"]["kernel"]) // encoder.patch**2
    of_encoder = keymaps.sizes(encoder, encoder.patch, channels)
    arrays = keymaps.write(keymaps.TIMM_VIT, weights, of_encoder)
    rows, columns = (side // encoder.patch for side in sides)
    arrays["pos_embed"] = keymaps.positions(rows, columns, encoder.width)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path, metadata={"format": "pt"})
