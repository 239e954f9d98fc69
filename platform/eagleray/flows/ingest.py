"""Ingest sources into a corpus: every item validated and hashed once, or quarantined with a reason; totals that
balance.

The listing is streamed into slices and frozen; each slice is a unit of work for a pool (child processes for a small
source, Ray Data over actors for the rest) and becomes one shard; then exact duplicates are settled and the manifest is
published last. A crash anywhere is answered by the same command: committed slices are not done again, and the corpus
digest is the same as if nothing had happened.

Refuses: a folder that holds anything else, other settings than the corpus was begun with, sources that have changed
    since.

Example:
    >>> run(IngestConfig(sources=("photos/", "more.zip"), out="corpora/photos")).images
    2012
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from eagleray.core import storage
from eagleray.core.commits import LEDGER, Ledger, collect_garbage
from eagleray.core.config import Config, digest, digest_json
from eagleray.core.errors import ConfigError, DataError, RunIncomplete
from eagleray.core.progress import Progress, notes
from eagleray.flows.pool import Pool
from eagleray.flows.units import map_units
from eagleray.vision import sources
from eagleray.vision.consolidation import Finish, consolidate
from eagleray.vision.corpus import CORPUS_SCHEMA, LISTING, ShardManifest, is_corpus, open_corpus, split_of
from eagleray.vision.images import Limits
from eagleray.vision.intake import HOME, SHARDS
from eagleray.vision.slices import MARKER, Listed, SliceSize, compare, write_slices
from eagleray.vision.sources import SOURCES, ListOptions, Tally

WORKER = "eagleray.vision.intake:SliceIngester"
RUN = "run.json"
ELSEWHERE = ("out", "address", "workers", "num_cpus", "in_process_below", "hang_timeout_s")  # change no result


class IngestConfig(Config):
    """What to ingest, to where; the rest says how.

    Attributes:
        sources: Folders, archives, Parquet files or listings; paths, globs, brace patterns or fsspec URIs.
        out: The corpus folder: new, empty, or of the same ingest.
        labels: ``folder``: class folders are labels; ``none``: only metadata gives labels.
        kind: ``auto``, or a key of SOURCES that all sources are read as.
        image_column: Column of a Parquet source or listing with the images or paths; empty: found by type and name.
        splits: Split name to its share, e.g. ``{train: 0.8, test: 0.2}``: by content hash, where the source names no
            split.
        seed: Of the splits.
        shard_images: Images of a shard at most.
        shard_mib: MiB of a shard at most, unless one image is larger.
        max_members, max_unpacked_gib, max_ratio: Caps on one archive (see ListOptions).
        max_pixels, max_side_px, max_file_mib: Caps on one image.
        address: A Ray cluster; default RAY_ADDRESS, else an embedded one.
        workers: Workers; 0 = one per core.
        num_cpus: Logical CPUs a worker holds on Ray.
        in_process_below: Fewer items than this are ingested on this machine without Ray.
        hang_timeout_s: An image that is not validated in so long ends its worker; 0 = no limit.
    """

    sources: tuple[str, ...] = Field(min_length=1)
    out: str
    labels: Literal["folder", "none"] = "folder"
    kind: str = "auto"
    image_column: str = ""
    splits: dict[str, float] = Field(default_factory=dict)
    seed: int = 0
    shard_images: int = Field(4096, ge=1)
    shard_mib: int = Field(64, ge=1)
    max_members: int = Field(ListOptions().max_members, ge=1)
    max_unpacked_gib: float = Field(ListOptions().max_unpacked_gib, gt=0)
    max_ratio: float = Field(ListOptions().max_ratio, gt=0)
    max_pixels: int = Field(Limits().max_pixels, ge=1)
    max_side_px: int = Field(Limits().max_side_px, ge=1)
    max_file_mib: int = Field(Limits().max_bytes // 2**20, ge=1)
    address: str | None = None
    workers: int = Field(0, ge=0)
    num_cpus: float = Field(1.0, gt=0)
    in_process_below: int = Field(256, ge=0)
    hang_timeout_s: float = Field(20.0, ge=0)

    @field_validator("sources", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("sources", mode="after")
    @classmethod
    def _absolute(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sources.absolute(source) for source in value)

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        if value != "auto" and value not in SOURCES:
            raise ValueError(f"unknown kind of source; one of auto, {', '.join(SOURCES)}")
        return value

    @field_validator("splits")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        try:
            if value:
                split_of("0" * 64, value)
        except ConfigError as error:
            raise ValueError(f"{error.seen}; {error.expected}") from None
        return value

    @property
    def settings(self) -> str:
        """Digest of all that changes the corpus."""
        return digest(self, exclude=ELSEWHERE)

    @property
    def limits(self) -> Limits:
        """Caps on one image."""
        return Limits(self.max_pixels, self.max_side_px, self.max_file_mib * 2**20)


def run(config: IngestConfig, *, is_quiet: bool = False, is_live: bool | None = None) -> ShardManifest:
    """Ingests, or resumes, or finds that there is nothing to do.

    Args:
        config: The ingest.
        is_quiet: No progress and no notes on stderr.
        is_live: A live line (True), log lines (False), or by whether stderr is a terminal.

    Returns:
        The corpus.

    Raises:
        ConfigError: ``out`` holds something else, or lies in a source.
        DataError: A source is missing, empty, damaged, or has changed since the corpus was made.
        ArtifactError: The corpus in ``out`` does not hold, or is of a newer schema.
        StorageError: No space, no permission, no answer; what was committed stays.
        RunIncomplete: The totals do not balance.
    """
    note = notes(is_quiet=is_quiet)
    root = Path(config.out.removeprefix("file://"))
    _refuse_foreign(root, config)
    if not is_corpus(root) and not (root / HOME / MARKER).exists():
        for source in config.sources:
            sources.detect(source)  # a wrong path is said before anything is written
    was_there = root.exists()
    root = storage.make_folder(root).resolve()
    with storage.only_writer(root / ".lock", what=str(root)):
        if is_corpus(root):
            return _unchanged(config, root, note)
        listed, tally = _listed(config, root, was_there=was_there)
        key = digest_json([CORPUS_SCHEMA, config.settings, listed.digest])
        ledger = Ledger(root, key).open()
        _work(config, root, ledger, listed, is_quiet=is_quiet, is_live=is_live)
        corpus = _finish(config, ledger, listed, tally)
    if not corpus.images:
        note(f"none of the {corpus.uris_in:,} items is an image; archives inside a folder are not opened: name them")
    return corpus


def _refuse_foreign(root: Path, config: IngestConfig) -> None:
    """A folder that holds something else, or lies in a source, is not written into."""
    for source in config.sources:
        inside = Path(source).is_dir() and root.resolve().is_relative_to(Path(source).resolve())
        if inside:
            raise ConfigError(
                f"{root} lies in the source {source}", expected="an --out elsewhere", fix="give another --out"
            )
    settings = None
    if is_corpus(root):
        settings = open_corpus(root).settings
    elif (root / HOME / RUN).exists():
        settings = storage.read_json(root / HOME / RUN)["settings"]
    elif root.is_dir() and (found := _foreign(root)):
        raise ConfigError(
            f"{root} is not empty and holds no corpus of `eagleray ingest`: {', '.join(found[:5])}",
            expected="a new or empty folder, or the corpus to resume",
            fix="give another --out",
        )
    if settings not in (None, config.settings):
        raise ConfigError(
            f"{root} holds {'a corpus' if is_corpus(root) else 'an unfinished ingest'} of other sources or settings",
            expected="the command that began it, or another folder",
            fix="give another --out",
        )


def _foreign(root: Path) -> list[str]:
    """What lies in a folder besides what an ingest leaves that was killed at its very start."""
    return sorted(path.name for path in root.iterdir() if not path.name.startswith(".") and path.name != HOME)


def _unchanged(config: IngestConfig, root: Path, note: Callable[[str], None]) -> ShardManifest:
    """A finished corpus: cleans up after a crash past the manifest, lists again and compares."""
    corpus = open_corpus(root)
    _clean(corpus)
    difference = compare(_batches(config, Tally()), root / LISTING)
    if difference:
        raise DataError(
            f"the sources have changed since {root} was made: {difference.new:,} new, {difference.changed:,} changed, "
            f"{difference.vanished:,} vanished" + (f", e.g. {difference.example}" if difference.example else ""),
            expected="the sources as they were: a corpus never changes",
            fix="ingest into another --out",
        )
    note(f"nothing to do: {root} holds these {corpus.uris_in:,} items as {corpus.images:,} images")
    return corpus


def _batches(config: IngestConfig, tally: Tally) -> Iterator[Any]:
    options = ListOptions(
        labels=config.labels,
        kind=config.kind,
        image_column=config.image_column,
        max_members=config.max_members,
        max_unpacked_gib=config.max_unpacked_gib,
        max_ratio=config.max_ratio,
    )
    for source in config.sources:
        yield from sources.list_items(source, options, tally=tally)


def _listed(config: IngestConfig, root: Path, *, was_there: bool) -> tuple[Listed, Tally]:
    """The frozen listing: that of the run before, or a new one."""
    home = root / HOME
    marker = home / MARKER
    if marker.exists():
        value = storage.read_json(marker)
        return Listed.from_json(value["listed"]), Tally(**value["tally"])
    storage.make_folder(home)
    storage.write_json(home / RUN, {"settings": config.settings, "sources": list(config.sources)})
    tally = Tally()
    try:
        size = SliceSize(config.shard_images, config.shard_mib * 2**20)
        listed = write_slices(_batches(config, tally), home, size)
    except DataError:  # a source that cannot be used: nothing is left that would refuse the mended command
        shutil.rmtree(home)
        if not was_there:
            shutil.rmtree(root, ignore_errors=True)
        raise
    storage.write_json(marker, {"listed": listed.to_json(), "tally": dataclasses.asdict(tally)})
    return listed, tally


def _work(
    config: IngestConfig, root: Path, ledger: Ledger, listed: Listed, *, is_quiet: bool, is_live: bool | None
) -> None:
    """Gives the slices that no attempt has committed to a pool."""
    done = ledger.committed()
    units = [
        {"unit": Path(path).stem, "slice": f"{HOME}/{path}", "rows": rows}
        for path, rows in listed.slices
        if Path(path).stem not in done
    ]
    if not units:
        return
    already = sum(int(part["uris"]) for part in done.values())
    settings = {
        "root": str(root),
        "key": ledger.key,
        "columns": list(_columns(config, listed)),
        "limits": dataclasses.asdict(config.limits),
        "splits": config.splits,
        "seed": config.seed,
        "hang_timeout_s": config.hang_timeout_s,
    }
    with Progress(total=listed.uris, what="ingest", already=already, is_live=is_live, is_quiet=is_quiet) as progress:
        for answer in _answers(config, units, settings):
            progress.update(done=answer["uris"], quarantined=answer["quarantined"])


def _answers(
    config: IngestConfig, units: list[dict[str, Any]], settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    is_local = config.address is None and sum(unit["rows"] for unit in units) < config.in_process_below
    pool = Pool(config.workers, config.num_cpus, is_local=is_local)
    place: AbstractContextManager[Any] = nullcontext()
    if not is_local:
        from eagleray.flows import runtime

        place = runtime.cluster(config.address)
    with place as where:
        if where is not None:
            pool = dataclasses.replace(pool, workers=runtime.pool_size(pool, where, len(units)))
        yield from map_units(units, WORKER, settings, pool)


def _columns(config: IngestConfig, listed: Listed) -> tuple[str, ...]:
    """Metadata columns of the corpus: those listed, and the split where one is given."""
    return tuple(sorted({*listed.columns, *(["split"] if config.splits else [])}))


def _finish(config: IngestConfig, ledger: Ledger, listed: Listed, tally: Tally) -> ShardManifest:
    root = ledger.root
    parts = ledger.committed()
    missing = [Path(path).stem for path, _ in listed.slices if Path(path).stem not in parts]
    if missing:
        raise RunIncomplete(
            f"{len(missing)} of {len(listed.slices)} slices are not ingested, e.g. {missing[0]}",
            expected="every slice committed",
            fix="run the same command again: it does what is missing",
        )
    about = {
        "sources": config.sources,
        "settings": config.settings,
        "skipped_special": tally.skipped_special,
        "metadata_unmatched": tally.metadata_rows - tally.metadata_matched,
        "columns": _columns(config, listed),
    }
    finish = Finish(root, root / HOME, ledger.key, listed, about)
    corpus = consolidate(finish, list(parts.values()))
    _clean(corpus)
    return corpus


def _clean(corpus: ShardManifest) -> None:
    """Removes what only the ingest needed, once the manifest stands."""
    for name in (HOME, LEDGER):
        shutil.rmtree(corpus.path / name, ignore_errors=True)
    collect_garbage(corpus.path, SHARDS, {"parts": corpus.shards})
    for path in corpus.path.glob(f"{storage.ASIDE}*"):  # half a file of a command that was killed
        path.unlink(missing_ok=True)
