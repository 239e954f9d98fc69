"""Prune a bundle: a narrower one of the same labels and preprocessing, to be fine-tuned.

What the layers do not need is taken out as a whole (learn/pruning.py). Thresholds are not carried over: they were found
for other probabilities. Nothing is trained here: `eagleray finetune --from OUT` in mode full does that.

Example:
    >>> run(PruneConfig(model="bundles/trash", out="bundles/trash-70", ratio=0.3))["macs_after"]
    87747712
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from eagleray.core.config import Config
from eagleray.core.config import digest as config_digest
from eagleray.core.errors import DataError
from eagleray.vision.bundle import ModelBundle, load_bundle
from eagleray.vision.splits import ALL, SplitRule, assign, read_index

if TYPE_CHECKING:
    from torch import nn

    from eagleray.learn.feeding import Batches


class PruneConfig(Config):
    """What to prune, and how much.

    Attributes:
        model: The bundle.
        out: The bundle to write.
        ratio: Share of the multiply-adds to take away.
        round_to: What the channels of a pruned layer are a multiple of.
        keep: Names of layers that stay as wide as they are.
        importance, scope, transformer, keeps_embedding: As in learn.pruning.PruneSettings.
        corpus: Of ``taylor``: where the images are that gradients are taken over.
        split: Of the corpus: a split's name, or ``all``.
        splits: How the corpus is split where it has no ``split`` column.
        num_images: Of ``taylor``.
        batch_size: Of ``taylor``.
        seed: Of the images.
    """

    model: str = Field(min_length=1)
    out: str = Field(min_length=1)
    ratio: float = Field(gt=0, lt=1)
    round_to: int = Field(8, ge=1)
    keep: tuple[str, ...] = ()
    importance: Literal["magnitude", "bn_scale", "taylor"] = "magnitude"
    scope: Literal["uniform", "global"] = "uniform"
    transformer: Literal["mlp", "heads", "both"] = "mlp"
    keeps_embedding: bool = True
    corpus: str | None = None
    split: str = Field("train", min_length=1)
    splits: SplitRule = Field(default_factory=SplitRule)
    num_images: int = Field(512, ge=1)
    batch_size: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _has_images(self) -> PruneConfig:
        if self.importance == "taylor" and self.corpus is None:
            raise ValueError("importance=taylor takes gradients over images: give corpus=CORPUS")
        return self


def run(config: PruneConfig) -> dict[str, Any]:
    """Prunes a bundle and saves the narrower one.

    Args:
        config: The run.

    Returns:
        The bundle's folder and digest, multiply-adds and parameters before and after.

    Raises:
        ConfigError: What ``learn.pruning.prune`` refuses; a bundle that is an ONNX graph; ``out`` holds something else.
        DataError: No labelled image to take a gradient over.
        ArtifactError: The bundle or the corpus does not hold.
        CapabilityError: torch-pruning is not installed, or cannot prune this architecture.
    """
    import torch

    from eagleray.flows.training_outputs import save_made, versions
    from eagleray.flows.training_run import Made
    from eagleray.learn.pruning import PruneSettings, prune
    from eagleray.learn.starting_point import load_model

    bundle = load_bundle(config.model)
    model = load_model(bundle)
    if config.importance == "taylor":
        _take_gradients(config, bundle, model)
    pruned = prune(
        model,
        ratio=config.ratio,
        example_x=torch.zeros(1, 3, bundle.image_spec.height, bundle.image_spec.width),
        keep=config.keep,
        round_to=config.round_to,
        settings=PruneSettings(**{name: getattr(config, name) for name in PruneSettings.model_fields}),
    )
    lineage = {
        "kind": "classifier",
        "step": "prune",
        "parent": {"bundle": bundle.name, "model_digest": bundle.model_digest, "lineage": dict(bundle.lineage)},
        **{name: bundle.lineage[name] for name in ("trained_on",) if name in bundle.lineage},
        "prune": {**config.model_dump(mode="json", exclude={"model", "out"}), **pruned.to_json()},
        "config_digest": config_digest(config, exclude=("model", "out")),
        "versions": versions(),
        "pruned_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    made = Made(pruned.model, bundle.image_spec, bundle.labels, bundle.output, lineage)
    saved = save_made(config.out, made, lineage)
    return {"bundle": str(saved.path), "digest": saved.model_digest, **pruned.to_json()}


def _take_gradients(config: PruneConfig, bundle: ModelBundle, model: nn.Module) -> None:
    """Adds up the gradients of the labels' loss over some images, in eval mode."""
    import torch

    from eagleray.learn.classification import ClassificationTask
    from eagleray.learn.order import Position
    from eagleray.learn.supervision import ClassificationSettings
    from eagleray.learn.task import Progress

    batches = _batches(config, bundle)
    settings = ClassificationSettings(is_multi_label=bundle.output == "multi_label_logits")
    task = ClassificationTask(
        model.requires_grad_(True), bundle.image_spec, settings, class_counts=batches.index.class_counts
    ).eval()
    progress, seen = Progress(0, 1, 0, 1), 0
    for batch in batches.iterate(Position()):
        tensors = {name: torch.from_numpy(value) for name, value in batch.arrays.items() if name != "key"}
        task.training_step(tensors, progress).loss.backward()
        seen += batch.num_images
        if seen >= min(config.num_images, len(batches.index)):
            return


def _batches(config: PruneConfig, bundle: ModelBundle) -> Batches:
    """Labelled images of the split, in an order of the seed.

    Raises:
        DataError: There are none.
    """
    from eagleray.learn.augmentation import EvalTransform
    from eagleray.learn.corpus_index import build_index
    from eagleray.learn.feeding import Batches, FeedSettings
    from eagleray.vision.corpus import open_corpus

    corpus = open_corpus(config.corpus or "")
    index = build_index(corpus, labels=bundle.label_ids)
    if config.split != ALL:
        index = index.subset(assign(read_index(corpus, config.splits), config.splits).mask(config.split))
    index = index.subset(index.num_targets > 0)
    if not len(index):
        raise DataError(
            f"no image of the split {config.split!r} of {corpus.path} has a label",
            expected="labelled images, to take gradients over",
            fix="name another split, or give importance=magnitude",
        )
    classes = len(bundle.labels) if bundle.output == "multi_label_logits" else None
    size = min(config.batch_size, len(index))
    feed = FeedSettings(batch_size=size, seed=config.seed, keeps_last=True)
    return Batches(index, EvalTransform(bundle.image_spec, num_classes=classes), feed)
