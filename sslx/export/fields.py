"""JSON files of checkpoints, and their fields by type and range."""

import json
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslx.export.keymaps import listed

log = logging.getLogger("sslx")

Json = dict[str, Any]

REQUIRED = object()
# Fields that change no output: how a model was saved, is called, trained, or used for generation.
IRRELEVANT = re.compile(
    r"_.*|architectures|auto_map|model_type|name_or_path|transformers_version|tokenizer_class|"
    r"(torch_)?dtype|id2label|label2id|num_labels|problem_type|finetuning_task|use_cache|"
    r"(unk|bos|eos|sep|cls|decoder_start)_token_ids?|output_\w+|return_dict|torchscript|"
    r"initializer_\w+|gradient_checkpointing|classifier_dropout|pooler_\w+|directionality|"
    r"encoder_stride|out_features|out_indices|stage_names|chunk_size_feed_forward|"
    r"(min|max)_length|num_(beams|return_sequences)|repetition_penalty|length_penalty|"
    r"temperature|top_[kp]|do_sample"
)


@dataclass(frozen=True)
class Kind:
    """What a field may hold.

    words    for an error message; {total} and {arrays} are what bounds a size
    holds    whether it may be a value, given total, the count of all numbers of the weights, and
             arrays, the count of arrays
    default  stands for a field that is absent; REQUIRED for those that every file has
    """

    words: str
    holds: Callable[[Any, int, int], bool]
    default: Any = REQUIRED


def is_whole(x: Any, low: int, high: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


# A size that exceeds what the weights hold is refused before anything of that size is made.
SIZE = Kind(
    "a whole number from 1 to {total:,}, the size of all weights together",
    lambda x, total, arrays: is_whole(x, 1, total),
)
COUNT = Kind(
    "a whole number from 1 to {arrays:,}, the number of arrays in the weights",
    lambda x, total, arrays: is_whole(x, 1, arrays),
)
SIDES = Kind(
    "a whole number or two, from 1 to {total:,}, the size of all weights together",
    lambda x, total, arrays: (
        len(pair(x)) in (1, 2) and all(is_whole(side, 1, total) for side in pair(x))
    ),
)
SIZES = Kind(
    "a list of whole numbers from 1 to {total:,}, the size of all weights together",
    lambda x, total, arrays: isinstance(x, list) and all(is_whole(i, 1, total) for i in x),
)
COUNTS = Kind(
    "a list of whole numbers, together at most {arrays:,}, the number of arrays in the weights",
    lambda x, total, arrays: (
        isinstance(x, list) and all(is_whole(i, 1, arrays) for i in x) and 0 < sum(x) <= arrays
    ),
)
ID = Kind(
    "a token id, a whole number from 0, or null",
    lambda x, total, arrays: x is None or is_whole(x, 0, total),
    None,
)
FLAG = Kind("true or false", lambda x, total, arrays: isinstance(x, bool))
SHARE = Kind("a number from 0 to below 1", lambda x, total, arrays: is_number(x) and 0 <= x < 1)
FRACTION = Kind("a number between 0 and 1", lambda x, total, arrays: is_number(x) and 0 < x < 1)


def one_of(names: Collection[str]) -> Kind:
    """A field that is one of these words."""
    return Kind(f"one of {', '.join(names)}", lambda x, total, arrays: x in tuple(names))


def pair(x: Any) -> list:
    """What may be written as one number or as a list of them, as a list."""
    return x if isinstance(x, list) else [x]


def read_json(path: Path) -> Json:
    """A JSON file that holds an object; raises ValueError where it does not."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the directory of a Hugging Face checkpoint.")
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a {type(value).__name__} where an object, {{...}}, is expected: "
            f"download it again."
        )
    return value


def checked(
    path: Path,
    config: Json,
    kinds: Mapping[str, Kind],
    computed: Mapping[str, tuple],
    sizes: tuple[int, int],
) -> Json:
    """The fields of `kinds` and `computed`, those that are absent by their defaults.

    Raises ValueError where a field of `kinds` is missing or holds what it may not, or where one of
    `computed` has another value than sslx computes. `sizes` are total and arrays of a Kind. Other
    fields that are set are named in the log.
    """
    required = [key for key, kind in kinds.items() if kind.default is REQUIRED]
    if missing := [key for key in required if key not in config]:
        raise ValueError(f"{path} lacks {listed(missing)}: transformers always writes them.")
    if config.get("quantization_config"):
        raise ValueError(
            f"{path} has a quantization_config: sslx reads weights in floating point alone; save "
            f"the model without quantization."
        )
    fields = {key: config.get(key, kind.default) for key, kind in kinds.items()}
    for key, kind in kinds.items():
        if key in config and not kind.holds(fields[key], *sizes):
            words = kind.words.format(total=sizes[0], arrays=sizes[1])
            raise ValueError(f"{path} has {key}={shown(fields[key])}: expected {words}.")
    for key, values in computed.items():
        fields[key] = config.get(key, values[0])
        if fields[key] not in values:
            raise ValueError(
                f"{path} has {key}={shown(fields[key])}, but sslx computes {values[0]!r}: the "
                f"outputs would differ from the model's."
            )
    others = [x for x in config if x not in fields and not IRRELEVANT.fullmatch(x) and config[x]]
    if others:
        log.warning("%s: %s not used", path, listed([f"{x}={shown(config[x])}" for x in others]))
    return fields


def shown(value: Any, most: int = 60) -> str:
    """A value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
