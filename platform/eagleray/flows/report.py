"""(Re)builds the page of a finished run: of scores, from the scores; of an evaluation or a training, from report.json.

Example:
    >>> rebuild("runs/photos")
    PosixPath('runs/photos/report.html')
"""

from __future__ import annotations

from pathlib import Path

from eagleray.assure.archive_report import score_report
from eagleray.assure.report import Report, Sheet
from eagleray.core import commits, storage
from eagleray.core.errors import ArtifactError
from eagleray.pages.page import write_page
from eagleray.vision.lookup import read_images

STORED = "report.json"  # what an evaluation keeps beside its page
SCORING = "scoring"  # where it keeps the run that has the pictures
EVALUATION = "evaluation"  # where a training run keeps its evaluation


def rebuild(folder: str | Path) -> Path:
    """Writes ``report.html`` of a finished run.

    Args:
        folder: The ``--out`` folder of ``eagleray score`` or ``eagleray evaluate``, or the run folder of a training.

    Returns:
        The page's path.

    Raises:
        DataError: The run is not finished.
        ArtifactError: A part that the manifest lists does not hold, or report.json is no report.
        StorageError: The page cannot be written.
    """
    folder = Path(folder)
    if (folder / STORED).exists() and not (folder / commits.MANIFEST).exists():
        home = folder / EVALUATION if (folder / EVALUATION).is_dir() else folder
        return write_with_pictures(folder, read_report(folder / STORED), home / SCORING / "input")
    return write_with_pictures(folder, score_report(folder), folder / "input")


def read_report(path: Path) -> Report:
    """A stored report.

    Raises:
        ArtifactError: It is not JSON, no report, or of a newer schema.
    """
    try:
        return Report.from_json(storage.read_json(path))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}", expected="a report as written", fix="run again") from None


def write_with_pictures(folder: Path, report: Report, home: Path) -> Path:
    """Writes the page; the pictures of its sheets are read from a frozen input.

    Args:
        folder: Where.
        report: What.
        home: ``DIR/input`` of the scoring run.
    """
    tiles = [tile for block in report.blocks if isinstance(block, Sheet) for tile in block.tiles]
    pictures = read_images(home, [tile.uri for tile in tiles if not tile.is_unsafe])
    return write_page(folder, report, read_image=pictures.get)
