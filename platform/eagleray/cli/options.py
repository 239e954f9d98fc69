"""What every verb shares, written once: common options, how a config is built, how a result is shown, how it ends.

A verb is a function of its own options and ``common``; it parses, builds its Config and calls one function.
``as_command`` adds the common options to its signature and runs it at the edge.

Example:
    >>> def report(path: Annotated[str, typer.Argument()], common: Common) -> Outcome: ...
    >>> command = as_command("report", report)
"""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
import typer.core
import typer.main

from eagleray.core.edge import guarded
from eagleray.core.errors import ConfigError

Recipe = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="YAML file of options; the others win")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="set any key; wins over all; repeatable"),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON value on stdout, nothing else there")]
Plain = Annotated[bool, typer.Option("--plain", help="log lines instead of a live line")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]

MOST_SHOWN = 6  # entries of a list in a text answer; --json has all

COMMON: dict[str, tuple[Any, Any]] = {
    "recipe": (Recipe, None),
    "assignments": (Assignments, None),
    "is_json": (AsJson, False),
    "is_plain": (Plain, False),
    "is_debug": (Debug, False),
}


@dataclass(frozen=True)
class Outcome:
    """What a verb has to say.

    Attributes:
        value: The result as JSON values (``--json``).
        text: The same for a person.
        exit_code: 0, or the code of a check that did not pass.
    """

    value: Any
    text: str = ""
    exit_code: int = 0


C = TypeVar("C")


@dataclass(frozen=True)
class Common:
    """The common options as given."""

    recipe: Path | None = None
    assignments: tuple[str, ...] = ()
    is_json: bool = False
    is_plain: bool = False
    is_debug: bool = False

    def load(self, kind: type[C], /, **given: Any) -> C:
        """Builds a verb's config: its defaults < the recipe < the options given < ``--set``.

        Args:
            kind: The Config subclass.
            **given: Options named as the config's fields; one that was not given is None or an empty list.
        """
        from eagleray.core.config import load, parse_assignments

        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None and value != []
        }
        overrides = {**options, **parse_assignments(self.assignments)}
        return load(kind, recipe=self.recipe, overrides=overrides)  # type: ignore[type-var, return-value]

    def refuse_config(self, verb: str) -> None:
        """For a verb without a config: ``--recipe`` and ``--set`` are an error rather than ignored.

        Raises:
            ConfigError: One of them was given.
        """
        if self.recipe or self.assignments:
            raise ConfigError(
                f"{verb} has no config", expected="neither --recipe nor --set", fix="leave them out of the command"
            )


class PlainStream(io.TextIOWrapper):
    """Standard error for ``--plain``: it says that it is no terminal, so nothing draws on it, ours or a library's."""

    def isatty(self) -> bool:
        """No."""
        return False


class VerbCommand(typer.core.TyperCommand):
    """A verb's command: typer writes the section of arguments, and click 8.4 and newer would write it again."""

    def format_arguments(self, ctx: Any, formatter: Any) -> None:
        """Leaves the arguments to typer."""


def as_command(name: str, verb: Callable[..., Outcome]) -> Any:
    """A click command of a verb: its own options, then the common ones; what it raises ends at the edge."""

    def run(**options: Any) -> None:
        common = Common(
            recipe=options.pop("recipe"),
            assignments=tuple(options.pop("assignments") or ()),
            is_json=options.pop("is_json"),
            is_plain=options.pop("is_plain"),
            is_debug=options.pop("is_debug"),
        )

        if common.is_plain and sys.stderr.isatty():
            sys.stderr = PlainStream(os.fdopen(os.dup(sys.stderr.fileno()), "wb", buffering=0), write_through=True)

        def body() -> int:
            outcome = verb(**options, common=common)
            _show(outcome, is_json=common.is_json)
            return outcome.exit_code

        raise typer.Exit(guarded(body, is_json=common.is_json, is_debug=common.is_debug))

    hints = get_type_hints(verb, include_extras=True)
    own = [
        p.replace(annotation=hints[p.name]) for p in inspect.signature(verb).parameters.values() if p.name != "common"
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(n, keyword, default=d, annotation=a) for n, (a, d) in COMMON.items()]
    parameters = [p.replace(kind=keyword) for p in own] + shared
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = (inspect.getdoc(verb) or "").replace("\n\n", "\n\n\b\n")  # \b: click keeps these lines as they are
    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    app.command(name, cls=VerbCommand)(run)
    command = typer.main.get_command(app)
    for parameter in command.params:  # click 8.4 and newer drop the help of an argument that typer 0.20 hands them
        if not getattr(parameter, "help", None) and parameter.name in hints:
            parameter.help = next(i.help for i in hints[parameter.name].__metadata__ if hasattr(i, "help"))  # type: ignore[attr-defined]
    return command


def _show(outcome: Outcome, *, is_json: bool) -> None:
    text = json.dumps(outcome.value, indent=1, ensure_ascii=False) if is_json else outcome.text
    if text:
        sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
        sys.stdout.flush()


def table(rows: Sequence[Sequence[Any]], *, heads: Sequence[str]) -> str:
    """Columns aligned by spaces; numbers stand right. Reads the same on a terminal, in a log and in a mail."""
    lines = [list(heads), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    is_right = [all(isinstance(value, int | float) for value in column) for column in zip(*rows, strict=True)]

    def said(line: Sequence[str]) -> str:
        cells = zip(line, widths, is_right or [False] * len(heads), strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

    return "\n".join(said(line) for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def fields(value: Mapping[str, Any]) -> str:
    """A mapping as ``name  value`` lines; nested mappings indented, long lists counted."""
    lines = []
    width = max((len(str(key)) for key in value), default=0)
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            lines += [str(key), *(f"  {line}" for line in fields(item).splitlines())]
        else:
            lines.append(f"{str(key).ljust(width)}  {_said(item)}")
    return "\n".join(lines)


def _said(item: Any) -> str:
    if isinstance(item, float):
        return f"{item:,.4f}".rstrip("0").rstrip(".")
    if not isinstance(item, list | tuple | Mapping):
        return _cell(item)
    shown = ", ".join(_said(entry) for entry in list(item)[:MOST_SHOWN])
    return (shown or "-") + (f", ... ({len(item):,} in all)" if len(item) > MOST_SHOWN else "")
