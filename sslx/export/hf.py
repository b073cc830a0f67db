"""Hugging Face checkpoints, written and read without torch or transformers."""

from pathlib import Path

from sslx.export.architectures import bert, resnet, vit
from sslx.export.card import About, card
from sslx.export.directory import Checkpoint, model_type
from sslx.models.encoder import Encoder
from sslx.objectives.base import Objective
from sslx.types import Buffers, Params

# An encoder of another kind is a file of its own, named here.
ARCHITECTURES = (vit, resnet, bert)


def save(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    out: Path | str,
    about: About,
    encoder: str | None = None,
) -> None:
    """Write directories under `out`: float32 weights, config, model card, and what prepares inputs.

    `encoder` names one of the objective's encoders, by default the first. Raises ValueError, before
    anything is written, for an encoder that no class of transformers expresses.
    """
    name, chosen = choose(objective, params, buffers, encoder)
    architecture = architecture_of(objective, name, chosen)
    for directory in architecture.write(objective, chosen, params, about):
        directory.save(Path(out), card(objective, directory, about))


def read(directory: Path | str) -> Checkpoint:
    """The params of a directory that `save` wrote, or of a checkpoint of Hugging Face's.

    Raises ValueError with the reason when it is not one that sslx computes.
    """
    directory = Path(directory).expanduser()
    kind = model_type(directory)
    for architecture in ARCHITECTURES:
        if kind in architecture.MODEL_TYPES:
            return architecture.read(directory)
    kinds = ", ".join(kind for a in ARCHITECTURES for kind in a.MODEL_TYPES)
    raise ValueError(
        f"{directory / 'config.json'} describes model_type={kind!r}, but only {kinds} can be "
        f"imported."
    )


def choose(
    objective: Objective, params: Params, buffers: Buffers, name: str | None
) -> tuple[str, Encoder]:
    """The name and the encoder that is exported."""
    encoders = objective.encoders(params, buffers)
    name = name or next(iter(encoders))
    if name not in encoders:
        raise ValueError(
            f"{type(objective).__name__} has no encoder {name!r}: use one of {', '.join(encoders)}."
        )
    return name, encoders[name]


def architecture_of(objective: Objective, name: str, encoder: Encoder):
    """The file of `architectures` that expresses an encoder; raises ValueError if none does."""
    for architecture in ARCHITECTURES:
        if type(encoder.module) is architecture.MODULE:
            return architecture
    kind = type(encoder.module or encoder.network).__name__
    known = ", ".join(a.MODULE.__name__ for a in ARCHITECTURES)
    raise ValueError(
        f"Only {known} can be exported, but the encoder {name!r} of {type(objective).__name__} is "
        f"a {kind}: take its features with Run.features, or its params with sslx.checkpoint.load."
    )
