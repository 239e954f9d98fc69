"""Contact sheets: finds the pictures that a Report's tiles name and puts small ones in: the page needs no network.

A picture is decoded at the scale it is shown, by the same safe decoder as for scoring. One that was refused as poison
is never opened; one that ends early is shown as far as it goes; where nothing can be shown, the page has a plain tile.

Example:
    >>> report = with_pictures(report, read_image=lambda uri: Path(uri.removeprefix("file://")).read_bytes())
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eagleray.assure.report import Report, Sheet, Tile

if TYPE_CHECKING:
    import numpy as np

    from eagleray.vision.images import Header

SIDE_PX = 160  # the longest side; a tile is shown at 110 to 170 CSS px
JPEG_QUALITY = 70  # 4 to 6 kB a tile: 72 tiles make a page of about 0.5 MB

ReadImage = Callable[[str], bytes | None]


def with_pictures(report: Report, read_image: ReadImage) -> Report:
    """The report with a thumbnail in every tile that can have one.

    Args:
        report: Any report; tiles that have a picture keep it.
        read_image: Gives the bytes behind a uri, or None. Called once for each uri, one at a time.
    """
    made: dict[str, str] = {}

    def fill(tile: Tile) -> Tile:
        if tile.image or tile.is_unsafe:
            return tile
        if tile.uri not in made:
            try:
                data = read_image(tile.uri)
            except OSError:  # an archive that has moved since: the page is made without its pictures
                data = None
            made[tile.uri] = thumbnail(data) if data else ""
        return dataclasses.replace(tile, image=made[tile.uri])

    blocks = tuple(
        dataclasses.replace(block, tiles=tuple(fill(tile) for tile in block.tiles))
        if isinstance(block, Sheet)
        else block
        for block in report.blocks
    )
    return dataclasses.replace(report, blocks=blocks)


def thumbnail(data: bytes, side_px: int = SIDE_PX) -> str:
    """A small JPEG of an image, upright, as a ``data:`` URI; empty when there is nothing to show."""
    from eagleray.vision.images import ImageRefused, ImageSpec, decode, probe

    try:
        header = probe(data)
    except ImageRefused:
        return ""
    scale = min(1.0, side_px / max(header.width, header.height))
    height, width = max(1, round(header.height * scale)), max(1, round(header.width * scale))
    spec = ImageSpec(
        height=height,
        width=width,
        crop_pct=1.0,
        crop_mode="squash",
        interpolation="bilinear",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    try:
        return _data_uri(decode(data, spec))
    except ImageRefused:
        rest = _what_is_there(data, header, spec)
        return _data_uri(rest) if rest is not None else ""


def _what_is_there(data: bytes, header: Header, spec: Any) -> np.ndarray | None:
    """The part of a cut or damaged JPEG that can be read, the rest gray; its size has been checked by ``probe``."""
    if header.format != "JPEG":
        return None
    import numpy as np
    import simplejpeg
    from PIL import Image

    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, "RGB", min_height=spec.height, min_width=spec.width, min_factor=1, strict=False
        )
    except ValueError:
        return None
    small = Image.fromarray(pixels)
    small.thumbnail((spec.width, spec.height))
    return np.asarray(small)


def _data_uri(rgb_u8_hwc: np.ndarray) -> str:
    import numpy as np
    import simplejpeg

    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(rgb_u8_hwc), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420"
    )
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
