"""Encoded picture -> uint8 of one fixed shape; everything random happens later, on the device."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image

from sslx.data.encoded import flat, opened, orientation
from sslx.data.source import Shapes, warned

TURN = PIL.Image.Transpose
UPRIGHT = {  # what lays a picture of an EXIF orientation upright
    **{2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM},
    **{5: TURN.TRANSPOSE, 6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90},
}
SIDEWAYS = (TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90)


@dataclass(frozen=True)
class Image:
    """Decode a record into image uint8 [size, size, channels] and extent int32 [2].

    crop   the short side becomes `size`, the center is kept; extent is (size, size)
    pad    the long side becomes `size`, at the top left of zeros; extent is its (height, width)

    Resizing is Pillow's bicubic, antialiased; a picture that already fits is not resampled. A JPEG
    at least four times too large is decoded at a fraction that is still twice `size` or more.
    Transparency is laid on white; gray of 16 bits and floats become 8 bits by the range of their
    type (`encoded.eight_bits`). Raises on a picture that is truncated or bombs.

    EXIF orientation is ignored, as torchvision and tfds do, so that labels of boxes and published
    numbers agree; the first such picture is warned of. `upright` turns pictures by it. (Pillow, and
    so torchvision, turns a TIFF in any case.)
    """

    size: int
    fit: Literal["crop", "pad"] = "crop"
    channels: int = 3
    upright: bool = False
    reads: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self):
        if self.size < 1 or self.channels not in (1, 3) or self.fit not in ("crop", "pad"):
            raise ValueError(f"{self}: size >= 1, fit 'crop' or 'pad', channels 1 or 3")

    def __call__(
        self, record: dict[str, Any], rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        image, shape = record["image"], (self.size, self.size, self.channels)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == shape:
            return {"image": image, "extent": np.array(shape[:2], np.int32)}
        picture = picture_of(image) if isinstance(image, np.ndarray) else opened(image)
        picture, extent = self.fitted(picture)
        image = np.asarray(picture)
        if image.shape != shape:  # padded, or gray
            canvas = np.zeros(shape, np.uint8)
            canvas[: extent[0], : extent[1]] = image.reshape(*extent, self.channels)
            image = canvas
        return {"image": image, "extent": np.array(extent, np.int32)}

    @property
    def shapes(self) -> Shapes:
        """Shape and dtype of what an example holds, known before any record is read."""
        image = (self.size, self.size, self.channels)
        return {"image": (image, np.uint8), "extent": ((2,), np.int32)}

    def fitted(self, picture) -> tuple[Any, tuple[int, int]]:
        """The picture at its final size, and the (height, width) of it."""
        mode = "RGB" if self.channels == 3 else "L"
        turn = self.turn(picture)
        order = slice(None, None, -1 if turn in SIDEWAYS else 1)
        size = picture.size[order]
        whole, box = self.geometry(*size)
        if size[0] >= 4 * whole[0]:
            picture.draft(None, tuple(2 * x for x in whole[order]))  # JPEG only; else does nothing
        picture = flat(picture, mode)
        if turn is not None:
            picture = picture.transpose(turn)
        if picture.size == whole:
            picture = picture.crop(box)
        else:  # crop and resize at once: only the pixels that stay are computed
            size = (box[2] - box[0], box[3] - box[1])
            sx, sy = picture.width / whole[0], picture.height / whole[1]
            box = (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
            picture = picture.resize(size, PIL.Image.Resampling.BICUBIC, box=box)
        return picture, picture.size[::-1]

    def turn(self, picture) -> PIL.Image.Transpose | None:
        """What lays a picture upright; None for one that is, or that is to stay as it lies."""
        turn = UPRIGHT.get(orientation(picture))
        if turn is not None and not self.upright:
            warned(
                "some pictures lie on a side or mirrored by their EXIF orientation, which is "
                "ignored, as published recipes do; Image(size, upright=True) turns them"
            )
        return turn if self.upright else None

    def geometry(self, w: int, h: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """Where a w x h picture goes: its whole resized size, and the box of that to keep."""
        s = self.size
        if self.fit == "pad":
            long = max(w, h)
            whole = max(1, round(s * w / long)), max(1, round(s * h / long))
            return whole, (0, 0, *whole)
        whole = (s, s * h // w) if w < h else (s * w // h, s)
        left, top = round((whole[0] - s) / 2), round((whole[1] - s) / 2)
        return whole, (left, top, left + s, top + s)


def picture_of(image: np.ndarray):
    if image.dtype != np.uint8:
        raise ValueError(
            f"an image array is uint8 [H, W, C], not {image.dtype} {image.shape}: multiply by 255 "
            "and round, or give the pipeline no decoder"
        )
    return PIL.Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
