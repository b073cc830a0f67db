"""The parts of a corpus, each of which becomes one shard of windows, and the manifest of all."""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data.source import DataError
from sslx.data.text.corpus import Tally, batched, texts
from sslx.data.text.files import Span, files, partition
from sslx.data.text.folder import alone, read_json, write_json, write_records
from sslx.data.text.tokenizers import (
    digest,
    tokenizer,
    tokenizer_digest,
    vocabulary,
    warn_of_unknown,
)
from sslx.data.text.windows import check_length, packed, record, width

PART = 8 << 20  # bytes of a part; doubled until there are at most PARTS
PARTS = 512
SAMPLE = 1 << 30  # characters that a tokenizer is trained on, spread over the corpus
BATCH = 1 << 19  # characters encoded together
FIRST = 64  # texts that are looked at before all
COUNTS = ("documents", "tokens", "unknown", "windows", "segments", "empty", "dropped")


@dataclass(frozen=True)
class Job:
    """Tokenize `source` into the folder `out`: what any process on any host needs to do its part.

    `out` has a tokenizer.json before the first part is written. Pickles with the plan, once made.
    """

    source: str
    out: str
    length: int = 128
    part: int | None = None  # bytes; None chooses

    def __post_init__(self):
        check_length(self.length)

    @functools.cached_property
    def plan(self) -> tuple[list[list[Span]], dict[str, str]]:
        """The parts of the corpus, and {file: reason} of what is in none."""
        paths, size = files(self.source), self.part or PART
        parts, dropped = partition(paths, size)
        while self.part is None and len(parts) > PARTS:
            size *= 2
            parts, dropped = partition(paths, size)
        return parts, dropped

    @property
    def parts(self) -> list[list[Span]]:
        return self.plan[0]

    def settings(self) -> dict[str, Any]:
        """The settings that the bytes of the shards depend on, beside the tokenizer."""
        stretches = [(span.path, span.begin, span.end) for part in self.parts for span in part]
        folders = {os.path.dirname(path) for path, *_ in stretches}
        root = os.path.commonpath(folders) if folders else ""  # the whole corpus may move
        layout = [(os.path.relpath(path, root or "."), *ends) for path, *ends in stretches]
        layout = json.dumps([layout, list(map(len, self.parts))])
        return {"format": 1, "length": self.length, "source": digest(layout.encode())}

    def shard(self, k: int) -> Path:
        return Path(self.out) / f"tokens-{k:05d}-of-{len(self.parts):05d}.array_record"

    def inputs(self, k: int) -> str:
        """What stands for the content of part k's files: their times."""
        return digest(
            json.dumps([os.stat(span.path).st_mtime_ns for span in self.parts[k]]).encode()
        )

    def written(self, k: int) -> dict[str, Any] | None:
        """What is known of shard k, None unless it is there and whole."""
        file = self.shard(k)
        try:
            about = read_json(file.with_suffix(".json"), "it is written again")
        except DataError:
            return None
        size = file.stat().st_size if file.exists() else 0
        same = {"bytes": size, "tokenizer": tokenizer_digest(self.out)}.items() <= about.items()
        return about if same else None

    def done(self, k: int) -> bool:
        """Whether shard k is there, whole, and of the files as they are."""
        about, inputs = self.written(k), self.inputs(k)
        return about is not None and about.get("inputs", inputs) == inputs  # old ones have none

    def write(self, k: int, progress: Callable[[int], None] = lambda count: None) -> None:
        """Write part k as a shard, under another name until it is whole. Another process that
        writes the same part is waited for, and its shard taken. What is held in memory does not
        depend on the part but for the index of its windows, some 130 bytes each."""
        with alone(Path(self.out), 1 + k):
            if self.done(k):
                progress(sum(span.size for span in self.parts[k]))
            else:
                self.write_alone(k, progress)

    def write_alone(self, k: int, progress: Callable[[int], None]) -> None:
        tally, words, inputs = Tally(), tokenizer(self.out), self.inputs(k)
        special, part = vocabulary(self.out), self.parts[k]
        done, size = 0, sum(span.size for span in part)

        def encoded():
            nonlocal done
            stream = (pair for span in part for pair in texts(span, tally))
            for batch in batched(stream, BATCH):
                given = [text for text, _ in batch]
                codes = words.encode_batch_fast(given, add_special_tokens=False)
                for code, (_, begins) in zip(codes, batch, strict=True):
                    ids = np.array(code.ids, width(special))
                    tally.counts["tokens"] += len(ids)
                    tally.counts["unknown"] += int((ids == special.unknown).sum())
                    yield ids, begins
                count = min(size - done, sum(len(text) for text, _ in batch))
                done += count
                progress(count)

        def records():
            for window in packed(encoded(), self.length):
                tally.counts["windows"] += 1
                tally.counts["segments"] += len(window)
                yield record(window, special)

        about = {"bytes": write_records(self.shard(k), records())}
        progress(size - done)
        about |= {
            "tokenizer": tokenizer_digest(self.out),
            "inputs": inputs,
            "counts": dict(tally.counts),
            "dropped": tally.dropped,
        }
        write_json(self.shard(k).with_suffix(".json"), about)

    def finish(self) -> dict[str, Any] | None:
        """Write and return the manifest, or None while parts are missing."""
        known = [self.written(k) for k in range(len(self.parts))]
        if None in known:
            return None
        counts, dropped = Counter(dropped=len(self.plan[1])), dict(self.plan[1])
        shards = []
        for k, about in enumerate(known):
            counts.update(about["counts"])
            dropped |= about["dropped"]
            if windows := about["counts"].get("windows", 0):
                row = {"name": self.shard(k).name, "bytes": about["bytes"], "windows": windows}
                shards.append(row)
        if not shards:
            few = "; ".join(f"{name} {reason}" for name, reason in list(dropped.items())[:3])
            raise DataError(f"{self.source} holds no text: {few}")
        warn_of_unknown(self.out, counts["unknown"], counts["tokens"])
        special = vocabulary(self.out)
        manifest = {
            **self.settings(),
            "vocabulary": asdict(special),
            "tokenizer": tokenizer_digest(self.out),
            "counts": {name: counts[name] for name in COUNTS},
            "shards": shards,
            "dropped": dropped,
        }
        with alone(Path(self.out), 0):
            write_json(Path(self.out) / "manifest.json", manifest)
        return manifest

    def check_cover(self) -> None:
        """Log a warning, before anything is written, if the first texts have unknown tokens."""
        given = list(islice(self.sample(), FIRST))
        codes = tokenizer(self.out).encode_batch_fast(given, add_special_tokens=False)
        ids = [i for code in codes for i in code.ids]
        unknown = ids.count(vocabulary(self.out).unknown)
        warn_of_unknown(f"{self.source}, first texts", unknown, len(ids))

    def sample(self) -> Iterator[str]:
        """Text to train a tokenizer on: of every part its beginning, SAMPLE characters in all."""
        total = sum(span.size for part in self.parts for span in part)
        for part in self.parts:
            room = SAMPLE * sum(span.size for span in part) // max(1, total)
            for text, _ in (pair for span in part for pair in texts(span, Tally())):
                yield text
                room -= len(text)
                if room < 0:
                    break


def claim(out: Path, ours: dict[str, Any]) -> None:
    """Make the folder this job's; raise if it is another's."""
    path = out / "job.json"
    if path.exists():
        theirs = read_json(path, f"remove {out}, or name another folder")
        changed = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if changed:
            raise DataError(
                f"{out} was begun with another {', '.join(changed)}: remove it, or name "
                "another folder"
            )
        return
    if [name for name in os.listdir(out) if name[0] != "."]:
        raise DataError(f"{out} holds other files: name a new folder")
    write_json(path, ours)
