"""Encoded picture -> uint8 of one fixed shape; everything random happens later, on the device."""

import io
import threading
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image
from PIL.JpegImagePlugin import JpegImageFile

from sslx.data.source import Shapes

LOCK = threading.Lock()


@dataclass(frozen=True)
class Image:
    """Decode a record into image uint8 [size, size, channels] and extent int32 [2].

    crop   the short side becomes `size`, the center is kept; extent is (size, size)
    pad    the long side becomes `size`, at the top left of zeros; extent is its (height, width)

    Resizing is Pillow's bicubic, antialiased; a picture that already fits is not resampled. A JPEG
    at least four times too large is decoded at a fraction that is still twice `size` or more.
    EXIF orientation is ignored, as torchvision and tfds do, so that labels of boxes and published
    numbers agree. Transparency is laid on white. Raises on a picture that is truncated or bombs.
    """

    size: int
    fit: Literal["crop", "pad"] = "crop"
    channels: int = 3
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
        if picture.size == (self.size, self.size):
            return flat(picture, mode), picture.size
        whole, box = self.geometry(*picture.size)
        if picture.width >= 4 * whole[0]:
            picture.draft(None, (2 * whole[0], 2 * whole[1]))  # JPEG only; else does nothing
        size = (box[2] - box[0], box[3] - box[1])
        picture = flat(picture, mode)
        if picture.size == whole:
            picture = picture.crop(box)
        else:  # crop and resize at once: only the pixels that stay are computed
            sx, sy = picture.width / whole[0], picture.height / whole[1]
            box = (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
            picture = picture.resize(size, PIL.Image.Resampling.BICUBIC, box=box)
        return picture, size[::-1]

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


class Jpeg(JpegImageFile):
    """A JPEG, opened without probing for formats and without EXIF, whose damage would only warn."""

    def _read_dpi_from_exif(self):
        pass


def opened(data: bytes | None):
    """Encoded bytes -> a Pillow picture, not yet decoded; too many pixels raise."""
    if not data:
        raise ValueError("no bytes")
    if data[:3] == b"\xff\xd8\xff":
        picture = Jpeg(io.BytesIO(data))
    else:
        with LOCK, warnings.catch_warnings():  # Pillow warns of a bomb, and only twice that raises
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            picture = PIL.Image.open(io.BytesIO(data))
    w, h = picture.size
    if w * h > PIL.Image.MAX_IMAGE_PIXELS:
        raise PIL.Image.DecompressionBombError(f"{w} x {h} pixels")
    return picture


def flat(picture, mode: str):
    """Any Pillow mode -> RGB or L: 16 bits lose the low byte, transparency is laid on white."""
    if picture.mode == mode and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        high = np.clip(np.asarray(picture).astype(np.int32) >> 8, 0, 255)
        picture = PIL.Image.fromarray(high.astype(np.uint8))
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        color = picture.convert("RGBA")
        picture = PIL.Image.new("RGBA", color.size, "white")
        picture.alpha_composite(color)
    return picture if picture.mode == mode else picture.convert(mode)


def picture_of(image: np.ndarray):
    if image.dtype != np.uint8:
        raise ValueError(
            f"an image array is uint8 [H, W, C], not {image.dtype} {image.shape}: multiply by 255 "
            "and round, or give the pipeline no decoder"
        )
    return PIL.Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
