"""Files of a tokenizer beside weights: written, and read for the ids that are special."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from sslx.data.text.tokenizers import tokenizer_file
from sslx.export.fields import Json, is_whole, read_json, shown
from sslx.export.keymaps import listed
from sslx.models.text import TextEncoder
from sslx.vocabulary import BERT, NAMES, ROBERTA, Vocabulary

log = logging.getLogger("sslx")

# How config.json names the special ids: pad_token_id.
CONFIG = {"pad": "pad", "unknown": "unk", "start": "bos", "end": "eos", "mask": "mask"}
TOKENIZER = {**CONFIG, "start": "cls", "end": "sep"}  # tokenizer_config.json


def tokenizer_files(folder: str, encoder: TextEncoder, kind: str) -> dict[str, Json | Path]:
    """tokenizer_config.json and tokenizer.json, by their names, from a tokenizer's folder or file.

    Raises ValueError where it is another model's.
    """
    path = Path(tokenizer_file(folder))
    words, spelled = encoder.vocabulary, {at: word for word, at in read_tokenizer(path)[0].items()}
    if lacking := [
        f"{name}={at}" for name, at in asdict(words).items() if name in NAMES and at not in spelled
    ]:
        raise ValueError(
            f"{path} has no special words at {listed(lacking)}: it is the tokenizer of another "
            f"vocabulary than the model's."
        )
    config = {
        f"{theirs}_token": spelled[getattr(words, ours)] for ours, theirs in TOKENIZER.items()
    }
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": encoder.length,
        "model_input_names": inputs if kind == "bert" else [inputs[0], inputs[2]],
    }
    return {"tokenizer_config.json": config, "tokenizer.json": path}


def read_vocabulary(directory: Path, config: Json, kind: str) -> Vocabulary:
    """The vocabulary, from the tokenizer beside the weights, or else from config.json.

    Raises ValueError where they contradict each other, or an id has no word vector.
    """
    size, path = config["vocab_size"], directory / "config.json"
    configured = {ours: config[f"{theirs}_token_id"] for ours, theirs in CONFIG.items()}
    if configured["pad"] is None:
        configured["pad"] = 0 if kind == "bert" else 1  # as in transformers
    if (file := directory / "tokenizer.json").is_file():
        words, count = read_tokenizer(file)
    elif (file := directory / "vocab.txt").is_file():  # BERT's, from 2018 on
        words, count = read_words(file)
    else:
        file, ids = path, configured
        if None in configured.values():
            ids = asdict(published(path, size, configured["pad"]))
        words, count = {NAMES[name][0]: ids[name] for name in NAMES}, size
    ids = special_ids(words, file)
    if count > size or max(ids.values()) >= size:
        raise ValueError(
            f"{file} has ids up to {max(count - 1, *ids.values())} and {path} says "
            f"vocab_size={size}: the words beyond have no vector."
        )
    for name, at in ids.items():
        if configured[name] in (None, at):
            continue
        text = (
            f"{path} says {CONFIG[name]}_token_id={configured[name]}, and {file} has "
            f"{NAMES[name][0]} at {at}"
        )
        if name in ("pad", "mask"):  # what a model computes depends on them
            raise ValueError(f"{text}: they are of different models.")
        log.warning("%s, which is used", text)
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"{file} gives one id to several special words: {ids}.")
    return Vocabulary(size, **ids)


def special_ids(words: Mapping[str, int], path: Path) -> dict[str, int]:
    """The ids of the special words by the fields of a Vocabulary."""
    ids = {
        name: next((words[w] for w in spelled if w in words), None)
        for name, spelled in NAMES.items()
    }
    if lacking := [NAMES[name][0] for name, at in ids.items() if at is None]:
        raise ValueError(
            f"{path} has no {listed(lacking)}: masked language modeling needs the special words of "
            f"BERT or RoBERTa; use the checkpoint's own tokenizer."
        )
    return ids


def published(path: Path, size: int, pad: int) -> Vocabulary:
    """BERT's or RoBERTa's vocabulary, whichever is of that size."""
    for known in (BERT, ROBERTA):
        if (known.size, known.pad) == (size, pad):
            return known
    raise ValueError(
        f"{path.parent / 'tokenizer.json'} is missing, and a vocabulary of {size} is neither "
        f"BERT's nor RoBERTa's: which ids are special is not known; save it with "
        f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
    )


def read_tokenizer(path: Path) -> tuple[dict[str, int], int]:
    """The special words of a tokenizer.json with their ids, and how many ids all words take."""
    described = read_json(path)
    added, model = described.get("added_tokens", []), described.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(added, list) or not isinstance(words, dict | list):
        raise ValueError(
            f"{path} has added_tokens={shown(added)} and model.vocab={shown(words)}, where a list "
            f"and the words of a tokenizer are expected."
        )
    special = {}
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"{path} has {shown(token)} in added_tokens, which is no token.")
        special[token["content"]] = token.get("id")
    # SentencePiece's words are pairs of a word and its score, in the order of their ids.
    ids = [*special.values(), *(words.values() if isinstance(words, dict) else range(len(words)))]
    if odd := [at for at in ids if not is_whole(at, 0, 2**31)]:
        raise ValueError(f"{path} has an id {shown(odd[0])}, which is no whole number from 0.")
    return special, max(ids, default=-1) + 1


def read_words(path: Path) -> tuple[dict[str, int], int]:
    """The words of a vocab.txt, one a line, with their ids, and how many there are."""
    try:
        words = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): download it again.") from error
    return {word.rstrip("\r"): i for i, word in enumerate(words)}, len(words)
