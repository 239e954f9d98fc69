"""The verb of access: apikeys, with its three actions.

A secret is written to stdout once, when it is made; no option takes one, so that none stands in a shell's history or in
the list of processes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from eagleray.cli.options import Common, Outcome, fields, table
from eagleray.core.errors import ConfigError

KEYS_FILE = "keys.json"
ACTIONS = ("create", "list", "revoke")
HEADS = ("id", "tenant", "models", "actions", "created", "expires", "state")


def apikeys(
    *,
    action: Annotated[str, typer.Argument(metavar="ACTION", help="create, list or revoke.")],
    key_id: Annotated[str | None, typer.Argument(metavar="ID", help="revoke: the key's id.")] = None,
    keys: Annotated[str | None, typer.Option("--keys", metavar="FILE", help="The key file; default keys.json.")] = None,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", metavar="NAME", help="create: who gets it; a tenant's keys share its rate."),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="create: what it opens; repeatable; default all."),
    ] = None,
    actions: Annotated[
        list[str] | None,
        typer.Option(
            "--action", metavar="NAME", help="create: predict, embed, metrics, admin; default predict, embed."
        ),
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option("--expires-days", metavar="N", help="create: when it ends; default never.")
    ] = None,
    images_per_s: Annotated[
        float | None, typer.Option("--images-per-s", metavar="N", help="create: sustained rate; default the service's.")
    ] = None,
    burst: Annotated[int | None, typer.Option("--burst", metavar="N", help="create: images at once.")] = None,
    images_per_day: Annotated[
        int | None, typer.Option("--images-per-day", metavar="N", help="create: quota of a day (UTC).")
    ] = None,
    common: Common,
) -> Outcome:
    """Makes, lists and ends the API keys of a service. Only hashes are kept: a key is shown once, when it is made.

    A running service reads the file again within a second. Example: eagleray apikeys create --tenant acme --model lite0
    """
    path = keys or KEYS_FILE
    if action == "create":
        asked = {"tenant": tenant, "models": models, "actions": actions, "expires_days": expires_days}
        rates = {"images_per_s": images_per_s, "burst": burst, "images_per_day": images_per_day}
        return _create(path, common, asked | rates)
    common.refuse_config("apikeys " + action)
    if action == "list":
        return _list(path)
    if action == "revoke":
        return _revoke(path, key_id)
    raise ConfigError(f"no action {action!r}", expected=f"one of {', '.join(ACTIONS)}", fix="give one of them")


def _create(path: str, common: Common, given: dict[str, Any]) -> Outcome:
    from eagleray.serving.access import KeyRequest, create_key

    record, key = create_key(path, common.load(KeyRequest, **given))
    said = {"key": key, **_facts(record), "file": str(Path(path).resolve())}
    note = f"Shown once, kept nowhere. Send it as: Authorization: Bearer {key[:15]}_..."
    return Outcome(said, f"{fields(said)}\n\n{note}")


def _list(path: str) -> Outcome:
    from eagleray.serving.access import read_keys

    rows = [_facts(record) for record in read_keys(path).keys]
    text = table([[_cell(row[head]) for head in HEADS] for row in rows], heads=HEADS) if rows else "no keys"
    return Outcome(rows, text)


def _revoke(path: str, key_id: str | None) -> Outcome:
    from eagleray.serving.access import KEY, revoke_key

    if not key_id:
        raise ConfigError("no id", expected="the id of a key", fix="eagleray apikeys list shows them")
    whole = KEY.fullmatch(key_id)  # a whole key on the command line: it is known to others now, so it ends all the same
    record = revoke_key(path, whole[1] if whole else key_id[:40])
    return Outcome(_facts(record), f"{record.id} ({record.tenant}) is revoked; services know within a second")


def _facts(record: Any) -> dict[str, Any]:
    said = record.model_dump(mode="json", exclude={"salt", "digest"}, exclude_none=True)
    return {"expires": None, **said, "state": record.state(time.time())}


def _cell(value: Any) -> str | None:
    return " ".join(value) if isinstance(value, list) else value
