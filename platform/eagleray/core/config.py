"""A run is one typed value: strict, frozen, loaded from a recipe and overrides, with a digest.

All faults are reported at once, unknown keys with the nearest name. A recipe states differences from the defaults only.

Example:
    >>> config = load(ScoreConfig, recipe="jobs/recipes/score-smoke.yaml", overrides={"top_k": "3"})
    >>> digest(config)
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from eagleray.core.errors import ConfigError


class Config(BaseModel):
    """The base of every config: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, arbitrary_types_allowed=False)


C = TypeVar("C", bound=Config)


def load(kind: type[C], *, recipe: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> C:
    """Builds a config: defaults, then the recipe, then the overrides.

    Args:
        kind: The Config subclass.
        recipe: A YAML file of keys; nested keys may be dotted.
        overrides: Dotted key to value. A string is read as YAML, so ``"3"`` is a number and ``"[a, b]"`` a list, unless
            the field takes the text as it stands.

    Raises:
        ConfigError: Every fault found, in one message.
    """
    values: dict[str, Any] = {}
    for key, value in (read_recipe(recipe) if recipe else {}).items():
        _put(values, key, value)
    for key, value in (overrides or {}).items():
        _put(values, key, value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _config_error(kind, error, recipe) from None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML recipe.

    Raises:
        ConfigError: The file is missing, is not YAML, or is not a mapping.
    """
    import yaml

    path = Path(path)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"no recipe at {path}",
            expected=f"one of {', '.join(near)}" if near else "a YAML file",
            fix="check the path",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(getattr(error, "problem_mark", "") or "").strip()
        raise ConfigError(
            f"{path} is not YAML: {where or error}", expected="a mapping of keys", fix="mend it"
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} holds a {type(loaded).__name__}", expected="a mapping of keys to values", fix="mend it"
        )
    return {str(key): value for key, value in loaded.items()}


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Turns ``key=value`` words into overrides; the value is read as YAML.

    Raises:
        ConfigError: A word has no ``=`` or no key.
    """
    import yaml

    overrides: dict[str, Any] = {}
    wrong = [word for word in assignments if "=" not in word or word.startswith("=")]
    if wrong:
        raise ConfigError(f"not an assignment: {', '.join(wrong)}", expected="key=value", fix="write e.g. top_k=3")
    for word in assignments:
        key, _, text = word.partition("=")
        try:
            overrides[key.strip().replace("-", "_")] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            overrides[key.strip().replace("-", "_")] = text
    return overrides


def digest(config: Config, *, exclude: Iterable[str] = ()) -> str:
    """SHA-256, in hex, of the config's canonical JSON: equal configs have equal digests on every machine.

    Args:
        config: The config.
        exclude: Fields that do not change the result (where it runs, how it is shown).
    """
    return digest_json(config.model_dump(mode="json", exclude=set(exclude)))


def digest_json(value: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of a value: keys sorted, no spaces, UTF-8 (RFC 8785 for our types)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"{dotted}: {parent} is not a group of keys", expected="a key of the config", fix="mend it"
            )
    values[leaf] = value


def _config_error(kind: type[Config], error: ValidationError, recipe: str | Path | None) -> ConfigError:
    faults = []
    names = list(kind.model_fields)
    for fault in error.errors(include_url=False):
        *parents, leaf = fault["loc"] or ("config",)
        key = ".".join(str(part) for part in (*parents, leaf))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(leaf), _keys(kind, parents), n=1)
            whole = ".".join(str(part) for part in (*parents, *near))
            faults.append(f"{key}: no such key" + (f"; did you mean {whole}?" if near else ""))
        elif fault["type"] == "missing":
            faults.append(f"{key}: missing")
        else:
            # What is wrong between several keys names them itself; the whole config after it would bury it
            got = "" if isinstance(fault.get("input"), Mapping) else f" (got {fault.get('input')!r})"
            lines = fault["msg"].removeprefix("Value error, ").splitlines()  # a validator may find several
            faults += [f"{key}: {line}{got}" for line in lines]
    where = f" in {recipe} or the command" if recipe else ""
    return ConfigError(
        f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in {kind.__name__}{where}:\n    " + "\n    ".join(faults),
        expected=f"keys of {', '.join(names)}",
        fix="correct them and run again",
    )


def _keys(kind: type[Config], parents: Iterable[str | int]) -> list[str]:
    """The keys of the group of keys at this place; of none when it is no group."""
    for parent in parents:
        if isinstance(parent, str):
            field = kind.model_fields.get(parent)
            groups = [part for part in _parts(field.annotation if field else None) if issubclass(part, Config)]
            if not groups:
                return []
            kind = groups[0]
    return list(kind.model_fields)


def _parts(annotation: Any) -> Iterator[type]:
    """The classes that an annotation is made of: of ``tuple[A, ...] | None`` A and NoneType."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
