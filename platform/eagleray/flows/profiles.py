"""Finds what ships beside the code (cluster/profiles.yaml, jobs/recipes) and reads the node shapes and their prices.

Looked for in this order: under EAGLERAY_HOME; in the nearest checkout, from the working folder upwards; in the checkout
that this code is of; in what the wheel installed (``sys.prefix/share/eagleray``).

Example:
    >>> [shape.name for shape in node_shapes()]
    ['local', 'c7i.4xlarge', ...]
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagleray.assure.cost import LOCAL, NodeShape
from eagleray.core.config import load, read_recipe
from eagleray.core.errors import ConfigError
from eagleray.flows.pool import cores

PROFILES = "cluster/profiles.yaml"
SCHEMA = 1


def homes() -> Iterator[Path]:
    """Folders that may hold what ships beside the code, the first to be asked first."""
    if os.environ.get("EAGLERAY_HOME"):
        yield Path(os.environ["EAGLERAY_HOME"])
    here = Path.cwd()
    yield from (folder for folder in (here, *here.parents) if (folder / "platform" / "eagleray").is_dir())
    yield Path(__file__).resolve().parents[3]
    yield Path(sys.prefix) / "share" / "eagleray"


def find_shipped(path: str) -> Path | None:
    """The file of that relative path in the first home that has it; None where none has."""
    return next((home / path for home in homes() if (home / path).is_file()), None)


def node_shapes() -> tuple[NodeShape, ...]:
    """Every kind of node of cluster/profiles.yaml, in its order; LOCAL with this machine's cores.

    Raises:
        ConfigError: The file is nowhere, is of another schema, or a shape in it is wrong.
    """
    path = find_shipped(PROFILES)
    if path is None:
        raise ConfigError(
            f"no {PROFILES} was found",
            expected=f"it in one of {', '.join(str(home) for home in homes())}",
            fix="set EAGLERAY_HOME to a folder that has it, or run inside a checkout",
        )
    found = read_recipe(path)
    shapes = found.get("shapes")
    if found.get("schema") != SCHEMA or not isinstance(shapes, list) or not all(isinstance(s, dict) for s in shapes):
        raise ConfigError(
            f"{path} is no list of node shapes", expected=f"schema: {SCHEMA} and shapes: [...]", fix="mend"
        )
    return tuple(_shape(values, path) for values in shapes)


def _shape(values: dict[str, Any], path: Path) -> NodeShape:
    if values.get("name") == LOCAL:
        counted = cores() if values.get("cores") in (None, "auto") else values["cores"]
        values = {**values, "cores": counted, "processor": platform.machine()}
    try:
        return load(NodeShape, overrides=values)
    except ConfigError as error:
        raise ConfigError(
            f"{path}, shape {values.get('name', '?')}: {error.seen}", expected=error.expected, fix="mend it"
        ) from None
