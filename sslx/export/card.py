"""Model cards, and what they and configs need to know of a run beside its weights."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from sslx.export.directory import Written
from sslx.objectives.base import Objective
from sslx.views import Views

log = logging.getLogger("sslx")

GRAY = (
    "It reads gray pictures, of one channel, and image processors of transformers convert none: "
    'give them `picture.convert("L")` of a Pillow picture.'
)
STRING = re.compile(r"""(['"])((?:(?!\1)[^\\\n]|\\.)*)\1""")
# At the start of a string or inside a URI, as in text:/x?tokenizer=/y, but not gs://bucket/x.
LOCAL = re.compile(r"(?:^|(?<=[:=,{]))(?:file://|~|/(?!/))(?:(?![?&]\w+=).)*")


@dataclass(frozen=True)
class About:
    """What is known of a run that its weights do not tell.

    shapes         the shape of each leaf of a batch of the eval view
    views, data    the recipe's; None where there are none
    step, recipe, numbers  for the model card: of the checkpoint, the printed config, its scores
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    views: Views = Views()
    data: Any = None
    step: int | None = None
    recipe: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def tokenizer(self) -> str | None:
        """The folder of the tokenizer that the training data were written with, if it is there."""
        if self.data is None:
            return None
        try:
            source, _ = self.data.mixture[0]
            return os.path.expanduser(source.path)
        except (ValueError, OSError, AttributeError) as error:
            log.warning("exported without a tokenizer: %s", error)
            return None


def card(objective: Objective, directory: Written, about: About) -> str:
    """The model card: the method as its docstring names it, how to open it, what it reached."""
    config, kind = directory.config, directory.kind
    method, opened = type(objective).__name__, config["architectures"][0]
    summary = (type(objective).__doc__ or method).strip().splitlines()[0]
    summary = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", summary)
    bare = ", add_pooling_layer=False" if opened == "ViTModel" else ""
    trained = f"sslx {version('sslx')}" + (f", step {about.step}" if about.step is not None else "")
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [sslx, {method.lower()}, {kind.lower()}]",
        "---",
    ]
    lines += [f"# {kind} pretrained with {method}", "", summary, ""]
    lines += [f"Encoder: {directory.size.format(**config)}. Trained with {trained}.", ""]
    lines += ["```python", f"from transformers import {opened}", ""]
    lines += [f'model = {opened}.from_pretrained("."{bare})', "```"]
    if config.get("num_channels") == 1:
        lines += ["", GRAY]
    if about.numbers:
        lines += ["", "| evaluation | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in about.numbers.items()]
    if about.recipe:
        lines += ["", "## Recipe", "", "```", without_paths(about.recipe.strip()), "```"]
    return "\n".join(lines) + "\n"


def without_paths(recipe: str) -> str:
    """A printed config without the paths of the machine that it ran on."""
    hidden = lambda text: text[1] + LOCAL.sub("(a local path)", text[2]) + text[1]  # noqa: E731
    return STRING.sub(hidden, recipe)
