"""Tokenizers: trained on text, read from a tokenizer.json, and what sslx wants to know of one.

The same text gives the same tokenizer, in every process. Hugging Face `tokenizers`, which does the
work, loads when it is needed.
"""

import functools
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from sslx.data.source import DataError, needs
from sslx.vocabulary import IDS, NAMES, Vocabulary

log = logging.getLogger("sslx")

Kind = Literal["wordpiece", "bpe"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of what is trained here
ALPHABET = 1000  # characters of WordPiece, the most frequent ones; others are unknown
COVERAGE = 0.9995  # of a text's characters: more are taken until so many are known, as is usual
UNKNOWN = 0.01  # share of unknown tokens above which a tokenizer does not fit its text


def train_tokenizer(texts: Callable[[], Iterable[str]], size: int, kind: Kind = "wordpiece"):
    """A `tokenizers.Tokenizer` of at most `size` ids trained on texts(), which is read twice.

    wordpiece  BERT's, lower case, without accents, of the most frequent characters
    bpe        byte-level, RoBERTa's: every text has an exact and reversible spelling
    """
    models, pre = hugging("models"), hugging("pre_tokenizers")
    trainers, normal = hugging("trainers"), hugging("normalizers")
    decoders, Tokenizer = hugging("decoders"), hugging("tokenizers").Tokenizer
    check_size(size, kind)
    if kind == "bpe":
        tokenizer, options = Tokenizer(models.BPE()), {"min_frequency": 2, "show_progress": False}
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre.ByteLevel.alphabet()),
            **options,
        )
        tokenizer.train_from_iterator(texts(), trainer)
    else:
        words = trained_wordpiece(texts, size)
        tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = (
            normal.BertNormalizer(),
            pre.BertPreTokenizer(),
        )
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = hugging("processors").TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def check_size(size: int, kind: Kind) -> None:
    """Raise DataError for a vocabulary without words, or of more than any text has."""
    if not len(SPECIAL) + 256 * (kind == "bpe") < size <= IDS:
        raise DataError(
            f"a {kind} vocabulary of {size} ids: it needs words beside {SPECIAL[0]} and such, and "
            f"has at most {IDS:,}; BERT has 30,522"
        )


def trained_wordpiece(texts, size: int) -> dict[str, int]:
    """Tokens -> ids. The library numbers the letters within words (`##a`) in the order of a hash
    table, which differs from process to process, and breaks ties between merges by number; so they
    are numbered here, as if they were special, and the same text gives the same vocabulary."""
    models, splitter = hugging("models"), hugging("pre_tokenizers").BertPreTokenizer()
    normalizer = hugging("normalizers").BertNormalizer()
    raw, counts = Counter(), Counter()
    for text in texts():
        raw.update(text)
    for letter, count in raw.items():
        for x in normalizer.normalize_str(letter):
            counts[x] += 0 if x.isspace() else count

    def forms(letter):  # punctuation and Chinese characters are always words of their own
        split = splitter.pre_tokenize_str(normalizer.normalize_str(f"a{letter}a"))
        return (letter, f"##{letter}") if len(split) == 1 else (letter,)

    letters = {letter: forms(letter) for letter in alphabet(+counts, size, forms)}
    within = [name for names in letters.values() for name in names[1:]]
    tokenizer = hugging("tokenizers").Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    trainer = hugging("trainers").WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*SPECIAL, *within],
        initial_alphabet=list(letters),
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer.get_vocab()


def alphabet(counts: Counter, size: int, forms: Callable[[str], tuple[str, ...]]) -> list[str]:
    """The most frequent letters, sorted: as many as cover the text and are ids below `size`; then,
    up to ALPHABET, as many as leave half of the ids to words."""
    letters, taken, left = [], len(SPECIAL), counts.total()
    rare = (1 - COVERAGE) * left
    for letter in sorted(counts, key=lambda x: (-counts[x], x)):
        covered = left <= rare
        taken += len(forms(letter))
        if taken > (size // 2 if covered else size) or (covered and len(letters) >= ALPHABET):
            break
        letters.append(letter)
        left -= counts[letter]
    return sorted(letters)


def warn_of_unknown(where: str, unknown: int, tokens: int) -> None:
    """Log a warning where the tokenizer does not know more than UNKNOWN of a text's tokens."""
    if unknown > UNKNOWN * tokens:
        log.warning(
            "%s: %.0f %% of the tokens are unknown, for the tokenizer lacks their characters, or "
            "they are words of over 100: take one trained on such text, with a larger --vocab, or "
            "with --kind bpe, which spells all",
            where,
            100 * unknown / tokens,
        )


def tokenizer(path: str):
    """The tokenizer of a tokenizer.json or of the folder that holds one, for text as it stands:
    without the truncation and padding that files bring along, and `[MASK]` written in a text is no
    mask token."""
    file = tokenizer_file(path)
    return loaded(file, os.stat(file).st_mtime_ns)


@functools.lru_cache(maxsize=8)
def loaded(file: str, modified: int):
    del modified  # a file that is replaced is read again
    try:
        tokenizer = hugging("tokenizers").Tokenizer.from_buffer(Path(file).read_bytes())
    except DataError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file} is no tokenizer of Hugging Face tokenizers: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary(path: str) -> Vocabulary:
    """How many ids a tokenizer has, and which are special, by BERT's or RoBERTa's names."""
    ids, special = tokenizer(path).get_vocab(with_added_tokens=True), {}
    for what, names in NAMES.items():
        known = [ids[name] for name in names if name in ids]
        if not known:
            raise DataError(
                f"{tokenizer_file(path)} has no {what} token, neither {' nor '.join(names)}: "
                "masked language modeling needs it; add it to the file's added_tokens, or train "
                "one: sslx tokenize SOURCE OUT --vocab N"
            )
        special[what] = known[0]
    return Vocabulary(max(ids.values()) + 1, **special)


def hugging(name: str):
    """A module of Hugging Face tokenizers."""
    return needs("tokenizers" if name == "tokenizers" else f"tokenizers.{name}", "tokenizers")


def tokenizer_file(path: str) -> str:
    path = os.path.expanduser(path)
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise DataError(f"{file} is missing: name a tokenizer.json, or a folder that holds one")
    return file


def tokenizer_digest(path: str) -> str:
    return digest(Path(tokenizer_file(path)).read_bytes())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
