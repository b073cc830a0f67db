"""timm checkpoints: one safetensors file, written without torch or timm."""

from pathlib import Path

from sslx.export.card import About
from sslx.export.directory import staged, write_arrays
from sslx.export.hf import architecture_of
from sslx.models.encoder import chosen
from sslx.objectives.base import Objective
from sslx.types import Buffers, Params


def save(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    out: Path | str,
    about: About,
    encoder: str | None = None,
) -> None:
    """Write an encoder as `timm.create_model(..., num_classes=0)` loads it, strictly.

    `out` is a .safetensors file, or a folder for model.safetensors. Raises ValueError for an
    encoder that timm does not have.
    """
    exported = chosen(objective.encoders(params, buffers), encoder)
    architecture = architecture_of(exported)
    if not hasattr(architecture, "timm_arrays"):
        raise ValueError(f"timm has no {type(exported.module).__name__}: use --format hf.")
    arrays = architecture.timm_arrays(exported, about)
    path = Path(out)
    path = path if path.suffix == ".safetensors" else path / "model.safetensors"
    with staged(path.parent) as new:
        write_arrays(arrays, new / path.name)
