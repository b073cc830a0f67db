"""Hugging Face checkpoints, written and read without torch or transformers."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from sslx.export.architectures import bert, resnet, vit
from sslx.export.card import About, card
from sslx.export.directory import Checkpoint, Files, staged
from sslx.export.fields import read_json, shown
from sslx.export.weights import stored_in
from sslx.models.encoder import Encoder, chosen
from sslx.objectives.base import Objective
from sslx.types import Buffers, Params

log = logging.getLogger("sslx")

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
    anything is written, for an encoder that no class of transformers expresses, and OSError, with
    nothing left behind, where the disk does not take it.
    """
    exported = chosen(objective.encoders(params, buffers), encoder)
    written = architecture_of(exported).write(objective, exported, params, about)
    with staged(Path(out)) as new:
        for directory in written:
            directory.save(new, card(objective, directory, about))


def read(directory: Path | str) -> Checkpoint:
    """The params of a directory that `save` wrote, or of a checkpoint of Hugging Face's.

    The directory is not trusted: what it says of sizes is held against its arrays before anything
    of that size is made, and every array of it is used once or named in the log. Raises ValueError
    with the reason when it is not one that sslx computes.
    """
    directory = Path(directory).expanduser()
    path = directory / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind is None and (kind := bert.kind_of(config)):
        log.warning("%s has no model_type: read as %s", path, kind)
    for architecture in ARCHITECTURES:
        if kind in architecture.MODEL_TYPES:
            files = Files(directory, kind, config, stored_in(directory))
            with named(directory):
                return architecture.read(files)
    kinds = ", ".join(kind for a in ARCHITECTURES for kind in a.MODEL_TYPES)
    raise ValueError(
        f"{path} describes model_type={shown(kind)}, but only {kinds} can be imported."
    )


@contextlib.contextmanager
def named(directory: Path) -> Iterator[None]:
    """A context whose ValueErrors name the directory."""
    try:
        yield
    except ValueError as error:
        if str(directory) in str(error):
            raise
        raise ValueError(f"{directory}: {error}") from error


def architecture_of(encoder: Encoder):
    """The file of `architectures` that expresses an encoder; raises ValueError if none does."""
    for architecture in ARCHITECTURES:
        if type(encoder.module) is architecture.MODULE:
            return architecture
    network = encoder.module or encoder.network
    kind = getattr(network, "__name__", type(network).__name__)
    known = ", ".join(a.MODULE.__name__ for a in ARCHITECTURES)
    raise ValueError(
        f"Only {known} can be exported, and this encoder is {kind}: take its features with "
        f"Run.features, or its params with sslx.checkpoint.load."
    )
