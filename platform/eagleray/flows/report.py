"""(Re)builds the page of a finished run: the report from its scores, the pictures from its input.

Example:
    >>> rebuild("runs/photos")
    PosixPath('runs/photos/report.html')
"""

from __future__ import annotations

from pathlib import Path

from eagleray.assure.archive_report import score_report
from eagleray.assure.report import Sheet
from eagleray.pages.page import write_page
from eagleray.vision.lookup import read_images


def rebuild(folder: str | Path) -> Path:
    """Writes ``report.html`` of a finished run.

    Args:
        folder: The ``--out`` folder of ``eagleray score``.

    Returns:
        The page's path.

    Raises:
        DataError: The run is not finished.
        ArtifactError: A part that the manifest lists does not hold.
        StorageError: The page cannot be written.
    """
    folder = Path(folder)
    report = score_report(folder)
    tiles = [tile for block in report.blocks if isinstance(block, Sheet) for tile in block.tiles]
    pictures = read_images(folder / "input", [tile.uri for tile in tiles if not tile.is_unsafe])
    return write_page(folder, report, read_image=pictures.get)
