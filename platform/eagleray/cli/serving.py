"""The verbs of serving: serve, rollout.

Each parses, builds its Config and calls one function. An option is named as its Config field and is None when it was
not given, so that the default stands in one place only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagleray.cli.archive import Address, Runtime
from eagleray.cli.options import Common, Outcome, fields

if TYPE_CHECKING:
    from eagleray.flows.serve import Running

Port = Annotated[int | None, typer.Option("--port", metavar="N", help="Default 8000; 0 takes one that is free.")]


def serve(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="[NAME=]BUNDLE", help="Repeatable; the first answers where none is named."),
    ] = None,
    port: Port = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDR", help="Default 127.0.0.1: this machine only.")
    ] = None,
    is_fast: Annotated[
        bool | None, typer.Option("--fast", help="HAProxy in front: several times the requests a second; wants keys.")
    ] = None,
    keys: Annotated[
        str | None, typer.Option("--keys", metavar="FILE", help="Key file; otherwise a key of this run.")
    ] = None,
    auth: Annotated[str | None, typer.Option("--auth", metavar="HOW", help="keys, or none: loopback only.")] = None,
    tls_cert: Annotated[str | None, typer.Option("--tls-cert", metavar="FILE", help="PEM chain; speaks TLS.")] = None,
    tls_key: Annotated[str | None, typer.Option("--tls-key", metavar="FILE", help="Its private key.")] = None,
    request_log: Annotated[
        str | None, typer.Option("--request-log", metavar="DIR", help="Keep a line a request there; never an input.")
    ] = None,
    runtime: Runtime = None,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="Of one engine.")] = None,
    engines: Annotated[int | None, typer.Option("--engines", metavar="N", help="Engines of a model.")] = None,
    common: Common,
) -> Outcome:
    """Serves models over HTTP on this machine until Ctrl-C: batched, guarded, the same answers as `score`.

    What does not fit together is refused before anything starts. All settings: --set, e.g. --set slo.latency_p99_ms=50.
    Example: eagleray serve --model bundles/lite0
    """
    from eagleray.flows.serve import ServeConfig, run

    config = common.load(
        ServeConfig,
        model=model,
        port=port,
        host=host,
        is_fast=is_fast,
        keys=keys,
        auth=auth,
        tls_cert=tls_cert,
        tls_key=tls_key,
        request_log=request_log,
        runtime=runtime,
        threads=threads,
        engines=engines,
    )

    out = sys.stdout  # while it serves, what Ray prints there goes to stderr

    def announce(running: Running) -> None:
        out.write((json.dumps(_facts(running)) if common.is_json else guide(running)) + "\n")
        out.flush()

    said = run(config, announce=announce, is_quiet=common.is_json)
    return Outcome(said, f"served {said['seconds']:g} s at {said['url']}")


def rollout(
    model: Annotated[
        str | None, typer.Argument(metavar="NAME=BUNDLE", help="The service's model, and its new bundle.")
    ] = None,
    *,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help="Of the service here; default 8000.")] = None,
    address: Address = None,
    watch_s: Annotated[
        float | None, typer.Option("--watch-s", metavar="S", help="How long the new replicas are watched; 30.")
    ] = None,
    allow_new_labels: Annotated[
        bool | None, typer.Option("--allow-new-labels", help="Take a bundle with other labels.")
    ] = None,
    common: Common,
) -> Outcome:
    """Replaces a model of a running service without a request that fails.

    A bundle that fails its probe set on the service's hardware is refused; one that leaves the SLO is taken back (6).
    Example: eagleray rollout lite0=bundles/lite0-int8
    """
    from eagleray.flows.rollout import RolloutConfig, run

    config = common.load(
        RolloutConfig, model=model, port=port, address=address, watch_s=watch_s, allow_new_labels=allow_new_labels
    )
    said = run(config, is_quiet=common.is_json)
    return Outcome(said, _rolled_out(said))


def _rolled_out(said: Mapping[str, Any]) -> str:
    """A rollout's summary for a person."""
    if not said["is_new"]:
        return fields({"nothing to do": said["model"], "digest": said["digest"][:12]})
    watched, parity = said["watched"], said["parity"]
    p99 = watched["latency_ms_p99"]
    return fields(
        {
            "model": said["model"],
            "digest": f"{said['digest'][:12]}, was {said['previous'][:12] or 'not readable here'}",
            "probe set": f"top-1 agrees on {parity['top1_agreement']:.0%}, max |dp| {parity['max_abs_dp']:.2g}",
            "watched": f"{watched['requests']:,} requests, {watched['failures']:,} failed, "
            f"p99 {'-' if p99 is None else f'{p99:,.0f} ms'}",
            "seconds": said["seconds"],
        }
    )


def _facts(running: Running) -> dict[str, Any]:
    """What a script needs, as one JSON line."""
    return {
        "url": running.url,
        "models": list(running.models),
        "version": running.version,
        "proxy": running.proxy,
        "key_file": None if running.key_file is None else str(running.key_file),
        "needs_key": running.needs_key,
        "seconds": round(running.seconds, 1),
    }


def guide(running: Running) -> str:
    """What a person copies: curl, Python, tritonclient, and the page's address. No secret is in it."""
    url, where = running.url, running.key_file or "KEY_HEADER_FILE"
    key = f"-H @{where} " if running.needs_key else ""
    tls = "--cacert YOUR_CA.pem " if running.is_tls else ""
    read = f"dict([open('{where}').read().strip().split(': ', 1)])" if running.needs_key else "{}"
    host = f"'{url.partition('://')[2]}'" + (", ssl=True" if running.is_tls else "")
    lines = [
        f"{', '.join(running.models)} at {url} after {running.seconds:.1f} s ({running.proxy} proxy). Ctrl-C ends it.",
        "",
        f"page          {url}/",
        f"curl          curl -sS {tls}{key}-H 'Content-Type: image/jpeg' \\",
        f"                --data-binary @photo.jpg {url}/v1/predict",
        "Python        import json, urllib.request",
        f"              headers = {{**{read}, 'Content-Type': 'image/jpeg'}}",
        f"              request = urllib.request.Request('{url}/v1/predict', open('photo.jpg', 'rb').read(), headers)",
        "              print(json.load(urllib.request.urlopen(request))['label_name'])",
        "tritonclient  import numpy, tritonclient.http",
        f"              client = tritonclient.http.InferenceServerClient({host})",
        "              image = tritonclient.http.InferInput('image', [1], 'BYTES')",
        "              image.set_data_from_numpy(numpy.array([open('photo.jpg', 'rb').read()], dtype=object))",
        f"              print(client.infer('{running.models[0]}', [image], headers={read}).as_numpy('label'))",
        "",
    ]
    if running.key_file:
        lines.append(f"The key of this run, which the page asks for, is in {where}; it ends with the service.")
    elif running.needs_key:
        lines.append(f"{where} holds one line, Authorization: Bearer er_..., with a key of `eagleray apikeys create`.")
    else:
        lines.append("No key is asked (auth: none): whoever has an account on this machine can use it.")
    return "\n".join(lines)
