"""The verbs of learning: pretrain, finetune, evaluate.

Each parses, builds its Config and calls one function. An option is named as its Config field and is None when it was
not given, so that the default stands in one place only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from eagleray.cli.archive import Address, Model, Out, Runtime
from eagleray.cli.options import Common, Outcome, fields, table

Corpus = Annotated[
    str | None, typer.Option("--corpus", metavar="CORPUS", help="Corpus: a folder that `ingest` wrote, with labels.")
]

SHOWN = ("top1", "top5", "balanced_accuracy", "f1_macro", "map", "roc_auc", "ece")

OutBundle = Annotated[
    str | None, typer.Option("--out", metavar="BUNDLE", help="Bundle to write; the run's folder is BUNDLE.run.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", metavar="N", help="Passes over the images.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Images a step, over all workers together.")
]
SizePx = Annotated[int | None, typer.Option("--size-px", metavar="PX", help="Side of the square input.")]
Workers = Annotated[
    str | None,
    typer.Option("--workers", metavar="N[,MOST]", help="Workers on Ray, or fewest,most; 0 is this process, no Ray."),
]
NumGpus = Annotated[float | None, typer.Option("--num-gpus", metavar="N", help="GPUs a worker holds.")]
Resume = Annotated[
    str | None, typer.Option("--resume", metavar="HOW", help="auto goes on; never lays an earlier run aside.")
]


def pretrain(
    *,
    corpus: Corpus = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="simclr (default), byol or dino.")
    ] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", metavar="NAME", help="A timm architecture.")] = None,
    out: OutBundle = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    size_px: SizePx = None,
    workers: Workers = None,
    num_gpus: NumGpus = None,
    resume: Resume = None,
    address: Address = None,
    common: Common,
) -> Outcome:
    """Learns a backbone from images alone; the result is a bundle that `finetune --from` and `score --embeddings` take.

    The same command again goes on where it stopped.
    Example: eagleray pretrain --corpus corpora/photos --method simclr --backbone resnet18 --out bundles/ssl
    """
    from eagleray.flows.pretrain import PretrainConfig, run

    config = common.load(
        PretrainConfig,
        corpus=corpus,
        method=method,
        backbone=backbone,
        out=out,
        epochs=epochs,
        batch_size=batch_size,
        size_px=size_px,
        workers=workers,
        num_gpus=num_gpus,
        resume=resume,
        address=address,
    )
    said = run(config)
    return Outcome(said, fields(said))


def finetune(
    *,
    corpus: Corpus = None,
    parent: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="Bundle, timm name, lite0, local-dir: or hf-hub:.")
    ] = None,
    out: OutBundle = None,
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="MODE", help="full; linear or head: the last layer, on features.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="BUNDLE", help="A bundle of the same labels that teaches too.")
    ] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    size_px: SizePx = None,
    workers: Workers = None,
    num_gpus: NumGpus = None,
    resume: Resume = None,
    address: Address = None,
    common: Common,
) -> Outcome:
    """Learns a classifier from the labels of a corpus, starting from a bundle or a timm model.

    The same command again goes on where it stopped.
    Example: eagleray finetune --corpus corpora/trash --from lite0 --mode head --out bundles/trash
    """
    from eagleray.flows.finetune import FinetuneConfig, run

    config = common.load(
        FinetuneConfig,
        corpus=corpus,
        parent=parent,
        out=out,
        mode=mode,
        teacher=teacher,
        epochs=epochs,
        batch_size=batch_size,
        size_px=size_px,
        workers=workers,
        num_gpus=num_gpus,
        resume=resume,
        address=address,
    )
    said = run(config)
    return Outcome(said, fields(said))


def evaluate(
    *,
    corpus: Corpus = None,
    model: Model = None,
    out: Out = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="Which images: a split's name, or all; default test.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="COLUMN[,COLUMN]", help="Metadata columns: the figures for each of their values."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="BUNDLE", help="Another model: is it really better or worse here?"),
    ] = None,
    runtime: Runtime = None,
    address: Address = None,
    common: Common,
) -> Outcome:
    """Judges a model against the labels of a corpus: accuracy, F1, ROC-AUC, calibration, each with its interval.

    A corpus with a split column uses it, another gets a hashed split. The same command again does nothing new.
    Example: eagleray evaluate --corpus corpora/photos --model bundles/lite0 --out runs/photos-eval --by site
    """
    from eagleray.flows.evaluate import EvaluateConfig, run

    config = common.load(
        EvaluateConfig,
        corpus=corpus,
        model=model,
        out=out,
        split=split,
        by=by,
        compare=compare,
        runtime=runtime,
        address=address,
    )
    said = run(config)
    return Outcome(said, _figures(said))


def _figures(said: Mapping[str, Any]) -> str:
    """An evaluation's summary for a person."""
    rows = [[name, said[name]["value"], said[name]["low"], said[name]["high"]] for name in SHOWN]
    lines = {
        "images": said["n"],
        "split": f"{said['split']['name']}, by {said['split']['how']}",
        "classes": said["num_classes"],
        "left out": sum(said["left_out"].values()),
        "page": said["report"] or "none",
        "figures": f"{said['out']}/metrics.json",
    }
    parts = [table(rows, heads=("metric", "value", "low", "high")), *_slices(said), fields(lines)]
    if "comparison" in said:
        parts.append(said["comparison"]["sentence"])
    return "\n\n".join(parts)


def _slices(said: Mapping[str, Any]) -> Iterator[str]:
    """One table a column of --by."""
    lead = "map" if said["task"] == "multi_label" else "top1"
    for column, slicing in said.get("slices", {}).items():
        rows = [
            [
                part["value"] or "(no value)",
                part["n"],
                *(part[lead][bound] for bound in ("value", "low", "high")),
                "too few to judge" if part["is_small"] else "lower than the rest" if part["is_lower"] else "",
            ]
            for part in slicing["slices"]
        ]
        yield table(rows, heads=(column, "images", lead, "low", "high", ""))
