"""The verbs of releasing: export.

Each parses, builds its Config and calls one function. An option is named as its Config field and is None when it was
not given, so that the default stands in one place only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from eagleray.cli.options import Common, Outcome, fields, table

CHECK_HEADS = ("engine", "version", "size MB", "ms p50", "ms p95", "img/s", "top-1 agrees", "max |dp|", "passes")


def export(
    model: Annotated[
        str | None, typer.Argument(metavar="BUNDLE", help="Bundle: a folder that `import` or `finetune` wrote.")
    ] = None,
    *,
    to: Annotated[str | None, typer.Option("--to", metavar="ENGINE", help="onnx, openvino or tensorrt.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="PATH", help="File for onnx, folder for openvino and tensorrt.")
    ] = None,
    check: Annotated[
        bool | None, typer.Option("--check", help="Measure every engine that is here: size, latency, agreement.")
    ] = None,
    has_preprocessing: Annotated[
        bool | None, typer.Option("--with-preprocessing", help="Normalise in the graph: uint8 N,H,W,3 in.")
    ] = None,
    common: Common,
) -> Outcome:
    """Writes a bundle in an engine's own form, once it answers the bundle's probe set as the model did.

    The same command again does nothing new.
    Example: eagleray export bundles/lite0 --to onnx --out lite0.onnx --check
    """
    from eagleray.flows.export import ExportConfig, run

    config = common.load(ExportConfig, model=model, to=to, out=out, check=check, has_preprocessing=has_preprocessing)
    said = run(config)
    return Outcome(said, _exported(said))


def _exported(said: Mapping[str, Any]) -> str:
    """An export's summary for a person."""
    parity = said["parity"]
    lines = {
        "written" if said["is_new"] else "nothing to do": said["out"],
        "size": f"{said['bytes'] / 1e6:,.2f} MB",
        "probe set": f"top-1 agrees on {parity['top1_agreement']:.0%} of {parity['num_probes']} images, "
        f"max |dp| {parity['max_abs_dp']:.2g} on {parity['engine']} {parity['version']}",
    }
    if "engine" in said:
        engine = said["engine"]
        run = "run here" if engine["is_run"] else "built, not run: no such GPU was asked"
        lines["engine"] = f"{engine['bytes'] / 1e6:,.2f} MB for {engine['for']}, {engine['library']}, {run}"
    parts = [fields(lines)]
    if said["checks"]:
        parts.append(table([_row(check) for check in said["checks"]], heads=CHECK_HEADS))
        parts += [f"{check['engine']}: not run: {check['reason']}" for check in said["checks"] if check["reason"]]
    return "\n\n".join(parts)


def _row(check: Mapping[str, Any]) -> list[Any]:
    def said(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    size = None if check["size_bytes"] is None else check["size_bytes"] / 1e6
    return [
        check["engine"],
        check["version"],
        said(size, ",.2f"),
        said(check["latency_ms_p50"], ",.2f"),
        said(check["latency_ms_p95"], ",.2f"),
        said(check["images_per_s"], ",.1f"),
        said(check["top1_agreement"], ".0%"),
        said(check["max_abs_dp"], ".2g"),
        check["is_passed"],
    ]
