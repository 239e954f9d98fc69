"""A training run under way: its config, its folder, where its progress is told; and what its weights become.

Example:
    >>> with opened("eagleray.flows.pretrain", config, is_quiet=False, is_live=None) as run:
    ...     run.line.show("step 1/400")
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray.core import storage
from eagleray.core.errors import ConfigError
from eagleray.core.progress import StatusLine
from eagleray.flows.run_folder import RunFolder
from eagleray.flows.train_worker import Spec
from eagleray.flows.training_config import TrainingConfig, absolute
from eagleray.vision.bundle import HEAD

if TYPE_CHECKING:
    from torch import nn

    from eagleray.vision.images import ImageSpec
    from eagleray.vision.prediction import Label


@dataclass(frozen=True)
class Made:
    """What a run's weights become: a model and what a bundle says of it.

    Attributes:
        model: A timm classifier in eval mode, on the CPU.
        spec: Its preprocessing.
        labels: In the order of its outputs.
        output: As in ModelBundle.
        lineage: Where it came from; the flow adds corpus, config, seed and versions.
    """

    model: nn.Module
    spec: ImageSpec
    labels: tuple[Label, ...]
    output: str
    lineage: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run under way.

    Attributes:
        flow: Module of the flow.
        config: The config.
        folder: Its folder.
        line: Where progress is told.
        started: Seconds since 1970.
        where: Where it ran last; filled in as it goes.
    """

    flow: str
    config: TrainingConfig
    folder: RunFolder
    line: StatusLine
    started: float
    where: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The verb."""
        return self.flow.rpartition(".")[2]

    def spec(self) -> Spec:
        """For the workers of a new entry into the run."""
        return Spec(self.flow, absolute(self.config), self.folder.enter(), self.started)


@contextmanager
def opened(flow: str, config: TrainingConfig, *, is_quiet: bool, is_live: bool | None) -> Iterator[Run]:
    """Holds the run's folder for this command.

    Raises:
        ConfigError: ``out`` or the folder holds something else, or another command writes into it.
    """
    folder = RunFolder(config.run_folder)
    line = StatusLine(flow.rpartition(".")[2], is_live=is_live, is_quiet=is_quiet)
    _refuse_occupied(config)
    folder.refuse_foreign()
    if config.resume == "never" and folder.root.is_dir():
        with storage.only_writer(folder.root / ".lock", what=str(folder.root)):
            aside = folder.lay_aside()
        if aside is not None:
            line.note(f"the earlier run is laid aside as {aside}")
    storage.make_folder(folder.root)
    with storage.only_writer(folder.root / ".lock", what=str(folder.root)):
        try:
            yield Run(flow, config, folder, line, time.time())
        finally:
            line.close()


def _refuse_occupied(config: TrainingConfig) -> None:
    """The bundle's folder is absent, empty, or a bundle: which one, ``train.already_done`` looks at."""
    out = Path(config.out)
    if "://" in config.out:
        raise ConfigError(f"the output {config.out} is a remote URI", expected="a folder", fix="mount it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / HEAD).is_file():
        raise ConfigError(
            f"{out} is not empty and no bundle of this run", expected="a new folder", fix="give another --out"
        )
    if config.resume == "never":
        raise ConfigError(
            f"{out} holds a bundle", expected="a new folder with --resume never", fix="give another --out"
        )


def command_line() -> str:
    """The command that runs this, as a person would type it."""
    if sys.argv and sys.argv[0].endswith(".py") and "eagleray/cli" not in sys.argv[0]:
        return shlex.join(["python", *sys.argv])
    return shlex.join(["eagleray", *sys.argv[1:]])
