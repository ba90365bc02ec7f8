"""Pictures: raster files by Pillow, drawings by cairosvg."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from diffgap.data.media._decoding import MAX_PIXELS, decoding
from diffgap.data.media.source import MediaError, Source
from diffgap.encoders._packages import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageReader"]

# Those that Pillow decodes by itself: an eps would start ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_SVG_SIDE = 448
_SVG_HEAD = 4096
_MAX_SVG = 16_000_000
# Without an address of its own a drawing loses what refers to its own parts (#gradient); nothing is fetched from it.
_BASE = "http://drawing/"
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class ImageReader:
    """Decodes a picture to a PIL image in RGBA, upright (EXIF orientation applied); the first frame of a moving one.

    png, jpeg, webp, gif, bmp, tiff and ppm by Pillow, 16-bit grey scaled to 8; svg by cairosvg, its longer side at 448
    pixels. The content decides, not the name. An svg reads no other file and no address, only ``data:`` inside itself.

    Raises:
        MediaError: "missing", "empty", "undecodable" (cut off counts), "too large" (more pixels than
            :data:`MAX_PIXELS`, a drawing above 16 MB or compressed).
        ModuleNotFoundError: Pillow or, for an svg, cairosvg is not installed.
    """

    @property
    def description(self) -> str:
        """What changes the pixels that come out."""
        return f"rgba exif-upright svg{_SVG_SIDE}"

    def __call__(self, source: Source) -> Image:
        """See the class."""
        require("PIL", "pillow")
        with source.open() as file, decoding(source):
            if (picture := _raster(file, source)) is not None:
                return picture
            file.seek(0)
            content = file.read(_MAX_SVG + 1)
            if source.suffix != ".svg" and b"<svg" not in content[:_SVG_HEAD]:
                raise MediaError("undecodable", f"{source} is no picture that can be read")
            if len(content) > _MAX_SVG or content.startswith(_GZIP):
                raise MediaError("too large", f"{source} is a drawing above {_MAX_SVG} bytes, or compressed")
            require("cairosvg", "cairosvg")
            return _drawing(content, source)


def _opened(file: BinaryIO, source: Source) -> Image:
    """The picture in ``file``, its pixels not yet decoded, after its size was checked."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(file, formats=_FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise MediaError("too large", f"{source}: {error}") from error


def _raster(file: BinaryIO, source: Source) -> Image | None:
    """The picture in ``file``, or None if it is none that Pillow knows."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = _opened(file, source)
    except UnidentifiedImageError:
        return None
    # Pillow's own conversion of wider grey clips at 255 instead of scaling.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        upright = ImageOps.exif_transpose(image)
        image = Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise MediaError("undecodable", f"{source}: its pixels of 32 bits have no known range")
    return ImageOps.exif_transpose(image).convert("RGBA")


def _drawing(content: bytes, source: Source) -> Image:
    from cairosvg.surface import PNGSurface
    from cairosvg.url import safe_fetch
    from PIL import Image

    class Bounded(PNGSurface):
        def _create_surface(self, width: float, height: float) -> tuple[object, float, float]:
            _check_size(width, height, source)
            return super()._create_surface(width, height)

    def fetch(url: str, kind: str) -> bytes:
        inside: bytes = safe_fetch(url, kind)  # data: only
        if inside.startswith(_GZIP):
            raise MediaError("too large", f"{source} holds a compressed drawing")
        if kind == "image/*" and b"<svg" not in inside:
            _opened(io.BytesIO(inside), source)
        return inside

    # Rendered twice: the first pass tells the proportions, so that the second can fix the longer side.
    wide, high = Image.open(io.BytesIO(Bounded.convert(content, url=_BASE, url_fetcher=fetch))).size
    size = {"output_width": _SVG_SIDE} if wide >= high else {"output_height": _SVG_SIDE}
    return Image.open(io.BytesIO(Bounded.convert(content, url=_BASE, url_fetcher=fetch, **size))).convert("RGBA")


def _check_size(width: float, height: float, source: Source) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError("too large", f"{source} holds a picture of {width:.0f} x {height:.0f} pixels")
