"""ImageReader: the same picture from every format, upright, and drawings that reach nothing outside themselves."""

from __future__ import annotations

import base64
import io
import socket
from pathlib import Path

import numpy as np
import pytest

from diffgap.data.media import Source
from diffgap.data.media.image import ImageReader
from tests.data.media.make import SIDE, number_of, png, stripes

from PIL import Image  # isort: skip

READ = ImageReader()
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="8" height="20">{}</svg>'
)


def drawn(body: str) -> Image.Image:
    pytest.importorskip("cairosvg", reason="needs cairosvg: pip install 'diffgap[offline]'")
    return READ(Source(data=SVG.format(body).encode()))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".ppm"])
@pytest.mark.parametrize("name", ["right", "a.png"])
def test_every_format_by_its_content(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"right{suffix}"
    stripes(0b10110010).save(path)
    image = READ(Source(path=path if name == "right" else path.rename(tmp_path / name)))
    assert (image.mode, image.size, number_of(image)) == ("RGBA", (SIDE, SIDE), 0b10110010)


def test_moving_pictures_give_their_first_frame(tmp_path: Path) -> None:
    for suffix in (".gif", ".webp"):
        stripes(5).save(tmp_path / f"a{suffix}", save_all=True, append_images=[stripes(9)], duration=100)
        assert number_of(READ(Source(path=tmp_path / f"a{suffix}"))) == 5


def test_transparency_is_kept() -> None:
    image = READ(Source(data=png(Image.new("LA", (3, 3), (90, 40)))))
    assert image.getpixel((1, 1)) == (90, 90, 90, 40)
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.info["transparency"] = 1
    assert READ(Source(data=png(palette))).getpixel((1, 1)) == (10, 20, 30, 0)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3))])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation(orientation: int, corner: tuple[int, int], kind: str) -> None:
    """Where the first pixel of a picture of 4 x 2 belongs, by the definition of the tag."""
    pixels = np.zeros((16, 32), dtype=np.uint8)
    pixels[:8, :8] = 255
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, kind, exif=exif)
    image = READ(Source(data=file.getvalue()))
    assert image.size == ((32, 16) if orientation in (1, 3) else (16, 32))
    small = np.asarray(image.convert("L"))[4::8, 4::8]
    assert tuple(int(i) for i in np.argwhere(small > 127)[0][::-1]) == corner


def test_grey_of_16_bits_is_scaled() -> None:
    values = np.array([[0, 257 * 100, 65_535]], dtype=np.uint16)
    assert np.asarray(READ(Source(data=png(Image.fromarray(values)))))[0, :, 0].tolist() == [0, 100, 255]


class TestDrawings:
    def test_longer_side_is_448(self) -> None:
        image = drawn('<rect x="2" y="2" width="4" height="16" fill="#c00"/>')
        assert (image.mode, image.size) == ("RGBA", (179, 448))
        assert image.getpixel((89, 224)) == (204, 0, 0, 255)
        assert image.getpixel((2, 2))[3] == 0

    def test_by_its_suffix_and_by_its_content(self, tmp_path: Path) -> None:
        pytest.importorskip("cairosvg", reason="needs cairosvg")
        content = SVG.format('<rect width="8" height="20" fill="#0c0"/>')
        (tmp_path / "a.png").write_text('<?xml version="1.0"?>\n<!-- a drawing -->\n' + content)
        (tmp_path / "b.svg").write_text(f"<!--{' ' * 5000}-->" + content)
        for name in ("a.png", "b.svg"):
            assert READ(Source(path=tmp_path / name)).getpixel((50, 50)) == (0, 204, 0, 255)
        stripes(3).save(tmp_path / "c.svg", "PNG")
        assert number_of(READ(Source(path=tmp_path / "c.svg"))) == 3

    def test_refers_to_its_own_parts(self) -> None:
        body = (
            '<defs><linearGradient id="a"><stop stop-color="#00c"/></linearGradient>'
            '<linearGradient id="b" xlink:href="#a"/><rect id="c" width="8" height="20" fill="url(#b)"/></defs>'
        )
        assert drawn(body + '<use xlink:href="#c"/>').getpixel((90, 200)) == (0, 0, 204, 255)

    @pytest.mark.parametrize(
        "body",
        [
            '<image xlink:href="{0}" width="8" height="20"/>',
            '<image xlink:href="{1}/a.png" width="8" height="20"/>',
            '<use xlink:href="{2}#box"/>',
            '<style>@import url("{3}");</style><rect class="red" width="8" height="20" fill="none"/>',
        ],
    )
    def test_reads_no_other_file_and_no_address(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
    ) -> None:
        (tmp_path / "a.png").write_bytes(png(Image.new("RGB", (8, 20), "red")))
        (tmp_path / "a.svg").write_text(SVG.format('<rect id="box" width="8" height="20" fill="red"/>'))
        (tmp_path / "a.css").write_text(".red { fill: red !important }")
        connected: list[object] = []
        monkeypatch.setattr(socket.socket, "connect", lambda self, address: connected.append(address))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: connected.append(a) or [])
        monkeypatch.chdir(tmp_path)
        for base in (tmp_path.as_uri(), "."):
            path = f"{base}/a"
            filled = body.format(f"{path}.png", "http://127.0.0.1:9", f"{path}.svg", f"{path}.css")
            assert np.asarray(drawn(filled)).max() == 0
        assert not connected

    def test_pictures_inside_it_are_drawn(self) -> None:
        inside = base64.b64encode(png(Image.new("RGB", (8, 20), "red"))).decode()
        image = drawn(f'<image xlink:href="data:image/png;base64,{inside}" width="8" height="20"/>')
        assert image.getpixel((90, 200)) == (255, 0, 0, 255)
