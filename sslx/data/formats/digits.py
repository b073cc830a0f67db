"""scikit-learn's handwritten digits."""

import functools
from dataclasses import dataclass

import numpy as np

from sslx.data.source import DataError, Source, needs


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, uint8 [8, 8, 1]: nothing to download."""

    leaves = ("image",)
    decoder = "Image(size)"

    split: str = ""
    resident = True

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        digits = needs("sklearn.datasets", "scikit-learn").load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # 0..16 -> 0..255
        cut = len(images) * 4 // 5
        parts = {"": slice(None), "train": slice(cut), "test": slice(cut, None)}
        if self.split not in parts:
            raise DataError(f"digits has no split {self.split!r}: use train, test or none for all")
        return images[parts[self.split]], digits.target[parts[self.split]]

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, index):
        images, labels = self.arrays
        name = f"digits:{self.split}#{index}"
        return {"image": images[index], "label": int(labels[index]), "name": name}
