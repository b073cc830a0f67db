"""Token ids: how many, and which are special. Imports nothing, so that data workers stay light."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """A batch's `tokens` are below `size`. What sslx trains itself has special ids 0 to 4."""

    size: int
    pad: int = 0
    unknown: int = 1
    start: int = 2  # [CLS], <s>
    end: int = 3  # [SEP], </s>
    mask: int = 4

    @property
    def special(self) -> tuple[int, ...]:
        return (self.pad, self.unknown, self.start, self.end, self.mask)


BERT = Vocabulary(30_522, pad=0, unknown=100, start=101, end=102, mask=103)
ROBERTA = Vocabulary(50_265, pad=1, unknown=3, start=0, end=2, mask=50_264)
